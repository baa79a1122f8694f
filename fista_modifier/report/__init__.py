"""
``pruning_report.json`` as a page to read and to send round. The file itself belongs to
the checkpoint (:mod:`fista_modifier.pruning.results`); this view of it needs the
extra ``report`` and is imported by nothing but its command.
"""

from fista_modifier.report.page import render, write_page

__all__ = ["render", "write_page"]
