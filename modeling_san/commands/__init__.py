"""Open-vocabulary segmentation from the command line."""
