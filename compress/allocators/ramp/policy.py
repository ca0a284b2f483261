"""The networks of RAMP on stable-baselines3, and policies as files.

Actor and twin critics are 512-LN-512-LN-256 by default: a normalisation after each
linear layer but the last hidden one. A policy is saved as ``policy.safetensors`` (the
actor) and ``policy.json`` (feature version, range of bits, widths, how it was trained);
nothing is pickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

from compress.allocators.ramp.features import LIMIT, SIZES
from compress.core.errors import AllocationError
from compress.core.foreign import MALFORMED, parse_json

FORMAT = 1
"""Version of the files."""


def normalised_mlp(inputs: int, widths: list[int]) -> nn.Sequential:
    """Return linear layers with ReLU, all but the last one normalised before it."""
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        layers.append(nn.Linear(inputs, width))
        if index + 1 < len(widths):
            layers.append(nn.LayerNorm(width))
        layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers)


class NormalisedActor(Actor):
    """An actor whose hidden layers are normalised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.latent_pi = normalised_mlp(self.features_dim, self.net_arch)


class NormalisedCritic(ContinuousCritic):
    """Twin critics whose hidden layers are normalised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        widths: list[int] = kwargs["net_arch"]
        inputs: int = kwargs["features_dim"]
        inputs += self.action_space.shape[0]  # type: ignore[index]
        for index in range(self.n_critics):
            network = normalised_mlp(inputs, widths)
            network.append(nn.Linear(widths[-1], 1))
            setattr(self, f"qf{index}", network)
            self.q_networks[index] = network


class NormalisedPolicy(SACPolicy):
    """Soft actor-critic with the two above."""

    def make_actor(self, features_extractor: Any = None) -> NormalisedActor:
        """Return a new actor."""
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return NormalisedActor(**kwargs).to(self.device)

    def make_critic(self, features_extractor: Any = None) -> NormalisedCritic:
        """Return new critics."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return NormalisedCritic(**kwargs).to(self.device)


@dataclass(frozen=True)
class PolicyCard:
    """What must be known to use a saved policy.

    Attributes:
        features: Version of the features.
        bits: Least and most nominal bits among the choices it was trained on.
        widths: Of the hidden layers.
        training: Hyper-parameters and figures of the training, for the reader.
        format: Version of the files.
    """

    features: str
    bits: tuple[int, int]
    widths: tuple[int, ...]
    training: dict[str, Any]
    format: int = FORMAT


def save_policy(actor: Actor, card: PolicyCard, folder: Path) -> None:
    """Write the actor and its card into a folder, which is made if need be.

    Raises:
        AllocationError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous() for k, v in actor.state_dict().items()}
        save_file(state, folder / "policy.safetensors")
        text = json.dumps(asdict(card), indent=1)
        (folder / "policy.json").write_text(text + "\n", "utf-8")
    except OSError as error:
        raise AllocationError(
            f"cannot save the policy in {folder}: {error}; give another save_policy"
        ) from error


def load_policy(folder: Path) -> tuple[NormalisedActor, PolicyCard]:
    """Read what :func:`save_policy` wrote.

    Raises:
        AllocationError: Files are missing, damaged or of another version.
    """
    try:
        raw = parse_json((folder / "policy.json").read_text("utf-8"))
        card = PolicyCard(
            features=raw["features"],
            bits=(int(raw["bits"][0]), int(raw["bits"][1])),
            widths=tuple(int(width) for width in raw["widths"]),
            training=dict(raw["training"]),
            format=int(raw["format"]),
        )
        if card.format != FORMAT or card.features not in SIZES:
            raise AllocationError(
                f"{folder}: the policy has format {card.format} and features "
                f"{card.features!r}; this version reads format {FORMAT} with features "
                f"{', '.join(SIZES)}; train it again"
            )
        actor = build_actor(card)
        actor.load_state_dict(load_file(folder / "policy.safetensors"))
    except (OSError, RuntimeError, *MALFORMED) as error:
        raise AllocationError(
            f"{folder} holds no policy that can be read: {type(error).__name__}: "
            f"{error}; give a folder that save_policy wrote"
        ) from error
    except SafetensorError as error:
        raise AllocationError(
            f"{folder}/policy.safetensors is damaged: {error}; train it again"
        ) from error
    return actor, card


def build_actor(card: PolicyCard) -> NormalisedActor:
    """Return an actor with the sizes of a card and random weights."""
    size = SIZES[card.features]
    policy = NormalisedPolicy(
        spaces.Box(-LIMIT, LIMIT, (size,)),
        spaces.Box(-1.0, 1.0, (1,)),
        lambda _: 0.0,
        net_arch=list(card.widths),
    )
    actor = policy.actor
    assert isinstance(actor, NormalisedActor)
    return actor.to(torch.device("cpu"))
