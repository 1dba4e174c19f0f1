"""What torch 2.14 and torchtitan 0.3.0 lack, and their private names. Newer ones make files here
deletable."""
