"""What every page of ours is made of: one file that loads nothing, and a browser that runs only its own scripts.

A template gets ``plotly_script``, the filter ``csp_hash`` for the content security policy, and ``dark``, the colours of
a dark page. It starts with ``page.css.j2``; its script starts with ``page.js.j2``. All text is escaped.
"""

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from personaspace.analysis.pages.charts import DARK


def render_page(template: str, **values: object) -> str:
    """The page of a template of this folder. Pure: the same values give the same text, fit to be written as UTF-8.

    ``values["data"]`` is what the page's script draws from: plain JSON, without NaN. Raises jinja2.UndefinedError for
    a value that the template needs and lacks.
    """
    environment = Environment(
        loader=PackageLoader("personaspace.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["csp_hash"] = _csp_hash
    page = environment.get_template(template).render(plotly_script=Markup(get_plotlyjs()), dark=DARK, **values)
    # A lone surrogate in a model's text could not be written as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
