"""Layout, charts and colours that all HTML pages share.

A page is a template that extends ``page.html.jinja`` and fills its blocks.
:func:`html_page.render` renders it with ``drawings``, the packed figures of its charts. Python code
makes a chart with ``charts``. The macro of ``chart.html.jinja`` places it on the page, and
``drawPage`` of ``page.js`` draws it. Pages name colours by their role in ``palette``.
"""
