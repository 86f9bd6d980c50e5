"""Memory gate, which admits a runner if the model fits into memory."""

from runner_client.memory.gate import Admission, GateDecision, MemoryGate

__all__ = ["Admission", "GateDecision", "MemoryGate"]
