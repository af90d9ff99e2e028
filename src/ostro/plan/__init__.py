"""Planning: what a run would hold and send on so many GPUs, from configurations alone."""
