# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Open-vocabulary segmentation from the command line."""
