"""The main job: train, evaluate and predict on real data. `settings` and `data` are light, `run` brings the Trainer."""
