"""What the forward and backward passes of a loop leave: batch, outputs, loss gradients."""
