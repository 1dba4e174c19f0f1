"""What torchtitan 0.3.0 lacks. A newer torchtitan makes files here deletable."""
