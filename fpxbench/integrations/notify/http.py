"""JSON over HTTP, with errors that name the host and no secret."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import requests

from fpxbench.integrations.notify.delivery import DeliveryError, masked

TIMEOUT_S = 20.0


def checked_url(url: str, option: str) -> str:
    """Return an http(s) URL. Raise ValueError for anything else, without showing it whole."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{option}: not an http or https URL (it is not shown, since it may hold a secret)")
    return url


def request_json(method: str, url: str, body: Any, headers: dict[str, str] | None = None,
                 params: dict[str, str] | None = None) -> Any:
    """Send JSON, and return the JSON of the answer, or None if it holds none. Raise DeliveryError.

    Redirects are not followed: a token would go to another host with them.
    """
    where = masked(url)
    try:
        answer = requests.request(method, url, json=body, headers=headers, params=params, timeout=TIMEOUT_S,
                                  allow_redirects=False)
    except requests.Timeout:
        raise DeliveryError(f"{where} did not answer within {TIMEOUT_S:.0f} s") from None
    except requests.RequestException as error:      # its text holds the whole URL
        raise DeliveryError(f"{where} cannot be reached ({type(error).__name__})") from None
    if not 200 <= answer.status_code < 300:
        raise DeliveryError(f"{where} answered {answer.status_code} {answer.reason}{_hint(answer.status_code)}")
    try:
        return answer.json()
    except ValueError:
        return None


def _hint(status: int) -> str:
    return {
        301: ": it has moved; give the new URL", 302: ": it has moved; give the new URL",
        308: ": it has moved; give the new URL",
        401: ": the token or the credentials are not accepted",
        403: ": the token may not do this, or too many requests",
        404: ": no such place, or the token may not see it", 429: ": too many requests; the next run tries again",
    }.get(status, "")
