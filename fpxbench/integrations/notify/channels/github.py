"""GitHub: an issue for each notice, or one comment on a pull request with all of them."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlsplit

from fpxbench.integrations.notify.delivery import DeliveryError
from fpxbench.integrations.notify.http import checked_url, request_json
from fpxbench.integrations.notify.notice import Notice

API = "https://api.github.com"
LABEL = "regression"
_PAGE = 100
_MOST_PAGES = 50


class GitHub:
    """Issues of a repository, or comments on one of its pull requests. A notice that is there already is updated."""

    updates = True

    def __init__(self, repository: str, token: str | None, *, pull_request: int | None = None, api: str = API) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", repository):
            raise ValueError(f"--github {repository!r}: not OWNER/NAME")
        self._api = checked_url(api, "--github-api").rstrip("/")
        if "@" in urlsplit(api).netloc:
            raise ValueError("--github-api: no user or password in it; the token is GITHUB_TOKEN")
        self._token, self._repository, self._pull_request = token, repository, pull_request
        self._path = f"/repos/{repository}/issues" + (f"/{pull_request}/comments" if pull_request else "")
        self.name = f"github {repository}" + (f" pull request {pull_request}" if pull_request else " issues")

    def preview(self, notice: Notice) -> str:
        """Return the request that opens it; where one is open already, it is updated by a PATCH of the same."""
        return f"POST {self._api}{self._path}\n{_shown(self._content(notice))}"

    def send(self, notice: Notice) -> str:
        """Open it, or update the one that is open. Return its page."""
        if not self._token:
            raise DeliveryError(f"GITHUB_TOKEN is not set: give a token that may write issues in {self._repository}")
        there = self._find(notice)
        if there is None:
            answer = self._request("POST", self._path, self._content(notice))
        else:
            content = {name: value for name, value in self._content(notice).items() if name != "labels"}
            place = "issues/comments/" + str(there["id"]) if self._pull_request else f"issues/{there['number']}"
            answer = self._request("PATCH", f"/repos/{self._repository}/{place}", content)
        return str(answer.get("html_url", "")) if isinstance(answer, dict) else ""

    def _content(self, notice: Notice) -> dict[str, Any]:
        if self._pull_request:
            return {"body": f"### {notice.title}\n\n{notice.body}"}
        return {"title": notice.title, "body": notice.body, "labels": [LABEL]}

    def _find(self, notice: Notice) -> dict[str, Any] | None:
        """Return the open issue, or the comment, that has the notice's id. Not by search, whose index lags behind."""
        mark = f"<!-- fpxbench {notice.id}:"
        params = {} if self._pull_request else {"state": "open", "labels": LABEL}
        for page in range(1, _MOST_PAGES + 1):
            found = self._request("GET", self._path, None, {**params, "per_page": str(_PAGE), "page": str(page)})
            if not isinstance(found, list):
                raise DeliveryError(f"GitHub's list of {self.name} is not a list")
            for one in found:
                if mark in (one.get("body") or "") and "pull_request" not in one:
                    return one
            if len(found) < _PAGE:
                return None
        raise DeliveryError(f"more than {_PAGE * _MOST_PAGES} entries in {self.name}: the one of this notice, if any, "
                            "was not found, and none is opened twice")

    def _request(self, method: str, path: str, body: Any, params: dict[str, str] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/vnd.github+json",
                   "X-GitHub-Api-Version": "2022-11-28"}
        return request_json(method, self._api + path, body, headers, params)


def _shown(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)
