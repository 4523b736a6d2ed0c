# %% [markdown]
# # 1. Try
#
# In the library this is [the tokenizer](../slm_jax/tokenizer.py).
#
# <details><summary>Solution</summary>
#
# ```python
# assert x == 1
# ```
# </details>

# %%
import matplotlib.pyplot as plt

x = 1
plt.plot([1, 2])
