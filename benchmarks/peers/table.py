"""The peers, by the names that the page has."""

from __future__ import annotations

from benchmarks.methods import METHODS
from benchmarks.peers.captum_methods import deep_lift, layer_integrated_gradients
from benchmarks.peers.effective_attention import effective_attention
from benchmarks.peers.inseq_methods import integrated_gradients
from benchmarks.peers.latim import latim
from benchmarks.peers.ours import ours
from benchmarks.peers.peer import Peer, Sum, alone
from benchmarks.peers.shap_methods import partition
from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance, ImplicitAttentionRollout


def of_benchmark(package: str | None, name: str, sums_to: Sum | None, claimed: bool = False) -> Peer:
    """Return a method of the benchmark as a peer."""
    return Peer(package, alone(METHODS[name].explain), sums_to, claimed, stored=name)


PEERS: dict[str, Peer] = {
    "Captum `InputXGradient`": of_benchmark("captum", "gradient × input", "output"),
    "Captum `IntegratedGradients`": of_benchmark("captum", "integrated gradients", "difference", True),
    "Captum `LayerIntegratedGradients`": Peer(
        "captum", alone(layer_integrated_gradients), "difference", True, stored="integrated gradients"
    ),
    "Captum `DeepLift`": Peer("captum", alone(deep_lift), "difference", True),
    "Captum `FeatureAblation` (occlusion)": of_benchmark("captum", "occlusion", "difference"),
    "shap `PartitionExplainer`": Peer("shap", alone(partition), "difference", True),
    "inseq, integrated gradients": Peer(
        "inseq", alone(integrated_gradients), "difference", True, stored="integrated gradients"
    ),
    "TransformerLens, effective attention": Peer("transformer-lens", effective_attention, None),
    "MambaLRP, restated": of_benchmark(None, "MambaLRP", "output", True),
    "LaTIM (ℓ2), restated": Peer(None, latim, None, stored="LaTIM ℓ2, last layer"),
    "ours: relevance, a reference": Peer(
        "captum-ssm", ours(ImplicitAttentionRelevance, 1), "difference", True, stored="relevance, reference"
    ),
    "ours: relevance, frozen gates": Peer(
        "captum-ssm", ours(ImplicitAttentionRelevance), "output", True, stored="relevance, frozen, half"
    ),
    "ours: rollout": Peer("captum-ssm", ours(ImplicitAttentionRollout), None, stored="unified, root, rollout"),
    "ours: attribution, signed": Peer(
        "captum-ssm", ours(ImplicitAttentionAttribution, rectify=None), None, stored="gradient-weighted, signed"
    ),
}
