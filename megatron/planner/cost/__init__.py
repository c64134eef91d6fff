"""What a layout costs: floating-point operations, bytes, messages, seconds."""
