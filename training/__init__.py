# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Training: data sets, recipes, the training loop, evaluation."""
