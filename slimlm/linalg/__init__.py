"""Pure tensor mathematics. Imports torch and nothing else of slimlm."""
