"""Paired evaluation of a tuned model against its base, its statistics, and the pages that show it.

Nothing here loads torch at import: `paired` needs it only while images are drawn, the rest never.
"""
