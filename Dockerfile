# The image that cluster.yaml and deploy/nightly.yaml run: Ray, and gmm_dist with its dependencies.
#
#   docker build -t gmm_dist .                          # CPU
#   docker build -t gmm_dist-gpu --build-arg DEVICE=gpu .
#
# DEVICE is the last part of the tags of rayproject/ray.
ARG RAY=2.60.0
ARG PYTHON=py311
ARG DEVICE=cpu
FROM rayproject/ray:${RAY}-${PYTHON}-${DEVICE}
# An ARG from before FROM has to be named again.
ARG DEVICE

# Dependencies first: this layer stays as long as the pins do. torch for the CPU alone lies in an
# index of its own, and takes a tenth of the space.
COPY --chown=ray:users pyproject.toml constraints.txt README.md LICENSE /home/ray/gmm_dist/
WORKDIR /home/ray/gmm_dist
# The index is two words, or none.
# hadolint ignore=SC2086
RUN python -c 'import tomllib; \
        print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && if [ "$DEVICE" = cpu ]; then index="--extra-index-url https://download.pytorch.org/whl/cpu"; fi \
    && pip install --no-cache-dir ${index:-} -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY --chown=ray:users gmm_dist gmm_dist
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir --no-deps .
