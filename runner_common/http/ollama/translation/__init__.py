"""Translation between Ollama's JSON and messages of ``mlxrunner.v1``."""
