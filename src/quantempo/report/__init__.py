"""Turn the files of a run folder into one page that can be read, printed and sent.

Here: `render`. The figures are in `plots`, the page in `html` and its template. Not here: any
computation on models or images. Reads nothing but the run folder.
"""

from quantempo.report.html import render

__all__ = ["render"]
