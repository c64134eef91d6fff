"""What trains a pipeline stage: DeepSpeed behind the project's own seam."""
