"""The federation's JSON Web Tokens."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jwt

from local_federation.wire import Refused


class Tokens:
    """Issues and reads HS256 tokens with the claims neuronId, name, type, capabilities, iat, exp and jti."""

    def __init__(self, secret: str, ttl: float, clock: Callable[[], float]) -> None:
        self._secret = secret
        self._ttl = ttl
        self._clock = clock

    def issue(self, registration: Mapping[str, Any]) -> str:
        now = self._clock()
        claims = {name: registration[name] for name in ("neuronId", "name", "type", "capabilities")}
        # Two tokens of one second would be the same text, and a renewal would look like none.
        claims |= {"iat": int(now), "exp": int(now + self._ttl), "jti": uuid.uuid4().hex}
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def bearer(self, authorization: str, *, even_expired: bool = False) -> str:
        """The neuronId that an Authorization header proves. Raises Refused (401)."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(401, "Missing or invalid authorization header")
        try:
            # Expiry is judged below by the federation's own clock, not by the library's.
            claims = jwt.decode(
                token.strip(),
                self._secret,
                algorithms=["HS256"],
                options={"verify_exp": False, "verify_iat": False},
            )
            neuron_id, expiry = claims["neuronId"], float(claims["exp"])
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError):
            raise Refused(401, "Invalid or expired token") from None
        if expiry <= self._clock() and not even_expired:
            raise Refused(401, "Invalid or expired token")
        return str(neuron_id)
