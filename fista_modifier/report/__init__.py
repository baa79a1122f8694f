"""
The page that shows ``pruning_report.json``, to be read and sent round.

The file itself is read and written by :mod:`fista_modifier.pruning.results`. Drawing it
needs the extra ``report``, so that only the command imports this folder. It may import
``pruning.results`` and nothing else of the package.
"""

from fista_modifier.report.page import render, write_page

__all__ = ["render", "write_page"]
