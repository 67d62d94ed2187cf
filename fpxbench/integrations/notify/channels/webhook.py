"""Any webhook: a POST with a JSON body from a template."""

from __future__ import annotations

import json
import os
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from fpxbench.integrations.notify.delivery import DeliveryError, masked
from fpxbench.integrations.notify.http import checked_url, request_json
from fpxbench.integrations.notify.notice import Notice

DEFAULT = '{"text": {{ notice.summary | tojson }}, "notice": {{ notice.model_dump(mode="json") | tojson }}}'
MASK = "***"


class Webhook:
    """Posts what a template makes of a notice. In it ``secret("NAME")`` is an environment variable, which a dry run
    does not show."""

    updates = False

    def __init__(self, url: str, template: str = DEFAULT) -> None:
        self._url = checked_url(url, "--webhook")
        self.name = masked(url)
        environment = SandboxedEnvironment(undefined=StrictUndefined)
        # jinja2's own tojson escapes for HTML.
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ValueError(f"--template: {error}") from None

    def preview(self, notice: Notice) -> str:
        """Return the body, secrets masked."""
        body = json.dumps(self._body(notice, lambda name: MASK), indent=1, ensure_ascii=False)
        return f"POST {self.name}\n{body}"

    def send(self, notice: Notice) -> str:
        """Post it."""
        request_json("POST", self._url, self._body(notice, _secret))
        return ""

    def _body(self, notice: Notice, secret: Any) -> Any:
        try:
            text = self._template.render(notice=notice, secret=secret)
        except TemplateError as error:
            raise DeliveryError(f"--template: {error}") from None
        try:
            return json.loads(text)
        except ValueError as error:
            raise DeliveryError(f"--template makes no JSON: {error}; write texts as {{{{ notice.title | tojson }}}}"
                                ) from None


def _secret(name: str) -> str:
    if name not in os.environ:
        raise DeliveryError(f"--template asks for secret({name!r}), and {name} is not set")
    return os.environ[name]
