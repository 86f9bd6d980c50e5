"""mlx_lm's chat templates in Python."""

from __future__ import annotations

from runner_server.mlx_backend.upstream.package_files import package_file

_FUNCTION = "\ndef apply_chat_template("


def python_template_file(name: object) -> str:
    """Return the file of the template with this name; empty if mlx_lm has none."""
    file = package_file("chat_templates", name)
    is_template = file is not None and _FUNCTION in file.read_text(encoding="utf-8")
    return str(file) if is_template else ""
