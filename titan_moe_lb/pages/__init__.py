"""Frame, charts and colours of every HTML page.

A page is a template that extends ``page.html.jinja`` and fills its blocks, rendered by
:func:`html_page.render` with ``drawings``, the packed figures of its charts. A chart is made in
Python (``charts``), shown by the macro of ``chart.html.jinja``, and drawn by ``drawPage`` of
``page.js``. Colours are roles of ``palette``, never literal.
"""
