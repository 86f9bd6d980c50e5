"""The routes of OpenAI's interface."""

from __future__ import annotations

from runner_common.http.endpoint import Endpoint
from runner_common.http.openai.chat import chat
from runner_common.http.openai.completions import complete
from runner_common.http.openai.embeddings import embed
from runner_common.http.openai.models import get_model, list_models

OPENAI_ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", "Chat", chat),
    Endpoint("POST", "/v1/completions", "Completion", complete),
    Endpoint("POST", "/v1/embeddings", "Embed", embed),
    Endpoint("GET", "/v1/models", "Status", list_models),
    Endpoint("GET", "/v1/models/{model:path}", "Status", get_model),
)
