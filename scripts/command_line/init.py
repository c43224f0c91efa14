"""The option --init."""

from __future__ import annotations

from dataclasses import replace

from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.training import CHECKPOINT, load_pretrained
from metaimplicit.training.rotation import versions


def load_init(options: RunOptions, learner: MetaLearner) -> RunOptions:
    """Load the network that --init names into the learner of a run that has no checkpoint yet.

    The checkpoint of a run that saved no step counts if it is resumed. A new run replaces it.

    Returns:
        The options with the digest of what was loaded, which is part of the identity of the run.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It does not fit the network, or is not the one that the run was started with.
    """
    has_checkpoint = any(path.exists() for path in versions(options.folder / CHECKPOINT))
    if options.init is None or (options.resume and has_checkpoint):
        return options
    head = str(learner.model.head_name)
    pretrained = load_pretrained(options.init, learner.model, head=head)
    if options.init_digest not in ("", pretrained.digest):
        raise ValueError(
            f"--init: {pretrained.path} has changed since the run was started, before its first "
            "checkpoint; start a new run"
        )
    print(f"--init: {pretrained}")
    return replace(options, init_digest=pretrained.digest)
