"""The viewer: one sample as training sees it, printed and drawn (`megabagel data inspect`).

`view.py` gathers what there is to see, `table.py` prints it, `mask.py` draws the attention mask, `page.py` a PNG page
and `html.py` an HTML page.
"""
