"""The section `questions`: what asks, the cases of each question, and their kernels."""
