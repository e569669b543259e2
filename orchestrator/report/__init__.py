"""The page of a run: report/index.html, one file that shows all that was found, without a network and on paper too.

    comparing.py   paired differences of every point from a baseline, by length and by task, corrected for their number
    verdict.py     the sentence on top: which merge to keep, and how sure that is
    figures.py     what each figure shows, as numbers: maps over the grid, curves, needle depths, fronts, costs
    charts.py      the numbers as SVG, drawn by matplotlib
    page.py        all of it in one HTML file, from what lies in the run
    mlflow_log.py  the same figures for an MLflow server

matplotlib draws, since its SVG is sharp on paper, needs no script to be read, hatches cells, and is some kilobytes a
chart; a script of 4 kB chooses between charts that are all there. The libraries that draw in the browser bring 1 to
5 MB of script a page, draw on a canvas that neither prints sharply nor can be read aloud, and cannot hatch a heatmap.
"""
