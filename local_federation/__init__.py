"""A federation on this machine, to try and test neurons against.

``python -m local_federation`` runs it; tests start one in their own process:

    with LocalFederation() as federation:
        print(federation.url)

It speaks the same wire as the real one. Where that one errs it does right, unless asked to err as well
(``like_real=True``, ``--like-real``).
"""

from __future__ import annotations

from local_federation.server import DEFAULT_ADMIN_KEY, LocalFederation, make_app
from local_federation.store import Store

__all__ = ["DEFAULT_ADMIN_KEY", "LocalFederation", "Store", "make_app"]
