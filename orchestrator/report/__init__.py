"""A run reported: the leaderboard on a terminal, and report/index.html, one file that needs no network and prints.

    run.py                reads a run once, for every report
    leaderboard.py        a line per point: scores, intervals, effective lengths
    scored_models.py      the scored model that a name, a path or a URL means
    two_models.py         one model against another on the same items
    against_baseline.py   every point against a baseline, by length and by task, corrected for their number
    recommendation.py     the sentence on top: which merge to keep, and how sure that is
    figures.py            the numbers of each figure
    charts.py             the numbers as SVG, drawn by matplotlib
    page.py               all of it in one HTML file
    live.py               renews the page during a run
    mlflow_log.py         the same figures for an MLflow server
    terminal/             tables for a terminal of any width

matplotlib draws because its SVG is sharp on paper, can be read without a script, hatches cells and takes some kilobytes
per chart; a script of 4 kB switches between charts. Libraries that draw in the browser add 1 to 5 MB of script to each
page, draw on a canvas that neither prints sharply nor can be read aloud, and cannot hatch a heatmap.
"""
