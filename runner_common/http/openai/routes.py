"""The routes of OpenAI's interface."""

from __future__ import annotations

from runner_common.http.endpoint import Endpoint
from runner_common.http.openai.models import get_model, list_models

OPENAI_ENDPOINTS = (
    Endpoint("GET", "/v1/models", "Status", list_models),
    Endpoint("GET", "/v1/models/{model:path}", "Status", get_model),
)
