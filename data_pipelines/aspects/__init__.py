"""Prompts -> yes/no questions by aspect, for a critic that is trained on: one resumable, checked stage.

    write_aspects     drafts of a writer, checked, retried, stored; one row a prompt (write.py)
    problems_of       what is wrong with a draft (checks.py)

Who writes (a parser, a served model) comes in as a builder. Importing this package loads no torch.
"""

from data_pipelines.aspects.checks import problems_of
from data_pipelines.aspects.write import AspectsConfig, checked_drafts, first_rows, write_aspects

__all__ = ["AspectsConfig", "checked_drafts", "first_rows", "problems_of", "write_aspects"]
