"""What models said in a run, answer by answer: a page that a small server or a bucket gives to a browser.

    address.py     the part of the page's address that chooses answers
    columns.py     the answers of a run as typed arrays and chunks of text
    site.py        every file of the page by its path: the index, the answers, the prompts
    serving.py     the files over HTTP, on this machine only
    exporting.py   the files in a folder or a bucket
    view.html, view.css, view.js

A browser reads `run.json` and one file of numbers for all answers, and filters and sorts them itself. Texts of answers
come in chunks as the list scrolls; a prompt comes when its item is opened. The prompts of an item that all points
answered lie in one file. Large files are gzip, which the page inflates, so that no server has to know.
"""
