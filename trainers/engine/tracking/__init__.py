"""The trackers that a run can use in addition to metrics.jsonl, by the values of `base.logger`."""

# name -> "module:Class", imported only when used; each is an ExternalTracker (external.py)
TRACKERS = {
    "tensorboard": "trainers.engine.tracking.tensorboard_tracker:TensorBoardTracker",
    "wandb": "trainers.engine.tracking.wandb_tracker:WandBTracker",
}
COMBINED = {"both": ("tensorboard", "wandb"), "none": ()}  # the other words: several names, or none
