from torch import Tensor

from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class Longest(Pruner):
    """Keeps the neurons whose columns of ``down`` are longest."""

    name = "demo-longest"
    summary = "longest columns of down (demo of an outside plug-in)"
    source = "none; an example"
    needs_activations = False
    budgets = "uniform"

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        return mlp.down.norm(dim=0)
