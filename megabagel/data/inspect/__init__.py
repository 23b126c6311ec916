"""Sample viewer (`megabagel data inspect`): one sample exactly as training uses it, as text, PNG or HTML.

`view.py` collects the data, `table.py` formats it as text, `mask.py` draws the attention mask, `page.py` a PNG page and
`html.py` an HTML page.
"""
