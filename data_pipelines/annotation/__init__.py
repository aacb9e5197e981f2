"""People label segments of pairs of clips on a page in their browser, served on loopback.

    Pairs           the rows of a folder in the dense format, and their clips as frames (pairs.py)
    Annotators      who voted what, which clip each sees on the left, undo (annotators.py)
    serve           the page and its requests (server.py, page.html)

Votes go to `data_pipelines.dense.votes`, each as it is given. Not here: how votes become labels.
"""

from data_pipelines.annotation.annotators import Annotators
from data_pipelines.annotation.pairs import Pairs
from data_pipelines.annotation.server import Server

__all__ = ["Annotators", "Pairs", "Server"]
