FROM python:3.11-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NEURON_STATE_DIR=/var/lib/neuron NEURON_HOST=0.0.0.0

# A fixed uid, so that a volume made for one build fits the next.
RUN useradd --system --uid 10001 --home-dir /app --shell /usr/sbin/nologin neuron \
    && install -d -o neuron -g neuron -m 0700 /var/lib/neuron

WORKDIR /app

# The dependencies change seldom, the code often: two layers.
COPY requirements.txt ./
RUN pip install -r requirements.txt

COPY neuron ./neuron
COPY neuron_client.py ./

USER neuron

# Identity, token and journal. Without a volume here, or NEURON_TOKEN, the federation will not know this neuron again.
VOLUME /var/lib/neuron

EXPOSE 8080

# slim has no curl. /health/live asks whether the process is worth keeping; the federation's state does not matter to it.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('NEURON_PORT', '8080') + '/health/live', timeout=4)"]

# Exec form: the neuron is process 1, gets SIGTERM itself, and its exit code is the container's.
ENTRYPOINT ["python", "neuron_client.py"]
