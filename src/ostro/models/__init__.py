"""Model code: plain, single-device; parallelism is applied from outside."""
