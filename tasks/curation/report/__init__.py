"""The report: one self-contained HTML file a snapshot, with the counts, the distributions and the pictures behind it.

It is made of the snapshot's manifest and tables alone, so it can be made again at any time and comes out the same.
"""

from tasks.curation.report.write import write_report

__all__ = ["write_report"]
