"""The memory gate, which admits a runner if its model fits."""

from runner_client.memory.gate import Admission, GateDecision, MemoryGate

__all__ = ["Admission", "GateDecision", "MemoryGate"]
