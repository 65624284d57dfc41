"""Who may come in, and how often: the filters that stand before all others."""

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from autopoiesis.gateway.keys import ApiKey
from autopoiesis.gateway.resource import API_KEYS, RATE_LIMIT, Config, seconds, typed
from autopoiesis.gateway.settings import CLIENT_HEADER

RATE_LIMITED = HTTPStatus.LOCKED
"""What the rate limit answers inside Envoy, so that it is told from the picker's 429; clients see 429."""
SHORTEST_REFILL_S = 0.05
"""Envoy's own bound."""


def access_filters(keys: Sequence[ApiKey]) -> list[Config]:
    """Return the filters; none without keys."""
    if not keys:
        return []
    limited = [key for key in keys if key.requests_per_minute is not None]
    return [_api_keys(keys), *([_rate_limit(limited)] if limited else [])]


def _api_keys(keys: Sequence[ApiKey]) -> Config:
    return typed(
        API_KEYS,
        "extensions.filters.http.api_key_auth.v3.ApiKeyAuth",
        credentials=[{"key": key.key, "client": key.client} for key in keys],
        key_sources=[{"header": "authorization"}],
        forwarding={"header": CLIENT_HEADER, "hide_credentials": True},
    )


def _rate_limit(keys: Sequence[ApiKey]) -> Config:
    slowest_s = max(60.0 / (key.requests_per_minute or 1) for key in keys)
    retry_after = {"key": "retry-after", "value": str(max(1, math.ceil(slowest_s)))}
    always: Config = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    client = {"header_name": CLIENT_HEADER, "descriptor_key": "client"}
    return typed(
        RATE_LIMIT,
        "extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="rate_limit",
        status={"code": RATE_LIMITED.value},
        filter_enabled=always,
        filter_enforced=always,
        rate_limits=[{"actions": [{"request_headers": client}]}],
        descriptors=[_limit(key) for key in keys],
        response_headers_to_add=[{"header": retry_after}],
        enable_x_ratelimit_headers="DRAFT_VERSION_03",
        always_consume_default_token_bucket=False,
    )


def _limit(key: ApiKey) -> Config:
    """A minute's requests may come at once; then they come back one by one."""
    a_minute = key.requests_per_minute or 1
    at_once = math.ceil(a_minute * SHORTEST_REFILL_S / 60.0)
    bucket: dict[str, Any] = {
        "max_tokens": a_minute,
        "tokens_per_fill": at_once,
        "fill_interval": seconds(max(at_once * 60.0 / a_minute, SHORTEST_REFILL_S)),
    }
    return {"entries": [{"key": "client", "value": key.client}], "token_bucket": bucket}
