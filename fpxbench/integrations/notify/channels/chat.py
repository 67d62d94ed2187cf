"""Slack, Discord, e-mail and a hundred others, through apprise."""

from __future__ import annotations

import json
import logging

from fpxbench.integrations.notify.delivery import DeliveryError, MissingPackage, masked
from fpxbench.integrations.notify.notice import Notice


class Chat:
    """One of apprise's services, by its URL: ``slack://…``, ``discord://…``, ``mailtos://…``."""

    updates = False

    def __init__(self, url: str) -> None:
        try:
            import apprise
        except ImportError:
            raise MissingPackage("--apprise: apprise is missing: pip install 'fpxbench[notify]'") from None
        logging.getLogger("apprise").setLevel(logging.CRITICAL)     # its messages hold URLs
        self._apprise = apprise.Apprise()
        if not self._apprise.add(url):
            raise ValueError(f"--apprise {masked(url)}: no service of apprise has such a URL; "
                             "https://appriseit.com lists them")
        self.name = masked(url)

    def preview(self, notice: Notice) -> str:
        """Return title and text."""
        return f"apprise {self.name}\n" + json.dumps(_content(notice), indent=1, ensure_ascii=False)

    def send(self, notice: Notice) -> str:
        """Send title and text."""
        import apprise

        # A service that fails says why in its log only, next to its URL.
        content = _content(notice)
        if not self._apprise.notify(title=content["title"], body=content["body"],
                                    body_format=apprise.NotifyFormat.TEXT, notify_type=apprise.NotifyType.WARNING):
            raise DeliveryError(f"{self.name}: not delivered; the service cannot be reached, or refused")
        return ""


def _content(notice: Notice) -> dict[str, str]:
    lines = [f"{notice.what} since PyTorch {notice.build}; {notice.good} is good.",
             "Confirmed by running both builds again." if notice.confirmed else "Not run again yet.",
             *(f"- {case}" for case in notice.cases[:10])]
    if len(notice.cases) > 10:
        lines.append(f"- and {len(notice.cases) - 10} more")
    lines.append(f"on {', '.join(notice.machines)}")
    if notice.upstream:
        lines.append(notice.upstream)
    return {"title": notice.title, "body": "\n".join(lines)}
