{{- define "llm-gateway.name" -}}
{{- default .Chart.Name .Values.nameOverride }}
{{- end }}

{{/* The name of what is the gateway's own: at most 40 characters, since a StatefulSet's pods carry a label of its name and 18 more. */}}
{{- define "llm-gateway.fullname" -}}
{{- $name := .Release.Name | replace "." "-" }}
{{- if not (contains (include "llm-gateway.name" .) $name) }}
{{- $name = printf "%s-%s" $name (include "llm-gateway.name" .) }}
{{- end }}
{{- if gt (len $name) 40 }}{{/* releases whose long names begin alike stay apart */}}
{{- $name = printf "%s-%s" ($name | trunc 33 | trimSuffix "-") ($name | sha256sum | trunc 6) }}
{{- end }}
{{- default $name .Values.fullnameOverride }}
{{- end }}

{{/* What selects the pods of a component: (list $ "gateway") */}}
{{- define "llm-gateway.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "llm-gateway.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The labels of an object of a component: (list $ "gateway") */}}
{{- define "llm-gateway.labels" -}}
{{- $root := index . 0 -}}
{{ include "llm-gateway.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The labels of a component's pods; no version, so that a new chart alone restarts nothing: (list $ "gateway") */}}
{{- define "llm-gateway.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "llm-gateway.selector" . }}
{{- with $root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* An image: (list $ .Values.image) */}}
{{- define "llm-gateway.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}

{{- define "llm-gateway.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "llm-gateway.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "llm-gateway.configMap" -}}
{{- default (printf "%s-routes" (include "llm-gateway.fullname" .)) .Values.existingConfigMap }}
{{- end }}

{{/* GATEWAY_CONFIG: the user's, else one whose only backend is the mock model. */}}
{{- define "llm-gateway.config" -}}
{{- if .Values.config -}}
{{ toYaml .Values.config }}
{{- else -}}
backends:
  mock-model: {url: "http://{{ include "llm-gateway.fullname" . }}-mock-model:8001"}
routes:
  - {model: "*", targets: [{backend: mock-model}]}
{{- end }}
{{- end }}

{{- define "llm-gateway.otlpEndpoint" -}}
{{- if .Values.telemetry.endpoint }}
{{- .Values.telemetry.endpoint }}
{{- else if .Values.collector.enabled }}
{{- printf "http://%s-collector:4318" (include "llm-gateway.fullname" .) }}
{{- end }}
{{- end }}

{{/* The variables that are files, as "NAME NAME ...". */}}
{{- define "llm-gateway.secretNames" -}}
{{- $names := keys .Values.secrets.create }}
{{- range .Values.secrets.existing }}{{ $names = concat $names (kindIs "map" .keys | ternary (keys (kindIs "map" .keys | ternary .keys dict)) .keys) }}{{ end }}
{{- $names | sortAlpha | join " " }}
{{- end }}

{{/* Seconds until the kubelet kills the pod, less those before the drain, less 5 for the last answers and spans. */}}
{{- define "llm-gateway.shutdownGrace" -}}
{{- with .Values.shutdown }}{{ sub .gracePeriodSeconds (add .preStopSeconds .delaySeconds 5) }}{{ end }}
{{- end }}

{{/* The variables that the user sets, whichever way, as a list in YAML; of a secret also the one that names its file. */}}
{{- define "llm-gateway.chosenVariables" -}}
{{- $names := keys .Values.settings }}
{{- range splitList " " (include "llm-gateway.secretNames" .) | compact }}{{ $names = concat $names (list . (print . "_FILE")) }}{{ end }}
{{- range .Values.extraEnv }}{{ $names = append $names .name }}{{ end }}
{{- toYaml $names }}
{{- end }}

{{/* Variables that only the chart sets, and what to do in place of setting them. */}}
{{- define "llm-gateway.ownVariables" -}}
GATEWAY_CONFIG: set `config`
GATEWAY_BACKEND_URLS: set `config`
GATEWAY_WORKERS: set `workers`
GATEWAY_SHUTDOWN_DELAY: set `shutdown`
GATEWAY_SHUTDOWN_GRACE: set `shutdown`
PORT: set `service`
POD_NAME: leave it out
{{- if include "llm-gateway.otlpEndpoint" . }}
OTEL_EXPORTER_OTLP_ENDPOINT: set `telemetry.endpoint`
{{- end }}
{{- if .Values.valkey.enabled }}
GATEWAY_LIMITS_URL: leave it out, or set `valkey.enabled` to false
GATEWAY_LIMITS_URL_FILE: leave it out, or set `valkey.enabled` to false
{{- end }}
{{- end }}

{{/* Fields of the pod that only the chart sets, and what to do in place of setting them. */}}
{{- define "llm-gateway.ownFields" -}}
containers: use `initContainers`, a sidecar with the restartPolicy Always
volumes: set `extraVolumes`
serviceAccountName: set `serviceAccount`
automountServiceAccountToken: leave it out
enableServiceLinks: leave it out
terminationGracePeriodSeconds: set `shutdown.gracePeriodSeconds`
securityContext: set `podSecurityContext`
imagePullSecrets: set `imagePullSecrets`
priorityClassName: set `priorityClassName`
topologySpreadConstraints: set `topologySpreadConstraints`
affinity: set `affinity`
nodeSelector: set `nodeSelector`
tolerations: set `tolerations`
{{- end }}

{{/* What all pods of the chart have alike. No service links: a Service named `gateway` would give variables such as GATEWAY_PORT. */}}
{{- define "llm-gateway.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The address on which everything listens. */}}
{{- define "llm-gateway.host" -}}
{{- get .Values.settings "HOST" | default "0.0.0.0" }}
{{- end }}

{{/* Bytes of a quantity of memory. */}}
{{- define "llm-gateway.bytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9]+" $text | int64 -}}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 -}}
{{- mul $number (get $factors (trimPrefix (toString $number) $text) | default 1) -}}
{{- end }}

{{/* Complaints about values that are each right and do not fit together. */}}
{{- define "llm-gateway.check" -}}
{{- if not (or .Values.config .Values.existingConfigMap .Values.mockModel.enabled) }}
{{- fail "No backend: set `config` (backends and routes), `existingConfigMap`, or `mockModel.enabled: true` for a try-out." }}
{{- end }}
{{- if and .Values.config .Values.existingConfigMap }}
{{- fail "Both `config` and `existingConfigMap` are set: set only one of them." }}
{{- end }}
{{- if lt (int64 (include "llm-gateway.shutdownGrace" .)) 5 }}
{{- fail "`shutdown.gracePeriodSeconds` must be at least 10 s above the sum of the other two: requests in flight need time to end." }}
{{- end }}
{{- $fullname := include "llm-gateway.fullname" . }}
{{- if not (regexMatch "^[a-z]" $fullname) }}
{{- fail (printf "`%s` would be the name of a Service, which must begin with a letter: set `fullnameOverride`." $fullname) }}
{{- end }}
{{- range $name := list "GATEWAY_API_KEYS" "GATEWAY_ADMIN_KEY" "GATEWAY_BACKEND_API_KEY" "GATEWAY_LIMITS_URL" }}
{{- if hasKey (default dict $.Values.settings) $name }}
{{- fail (printf "`%s` is a secret: set it in `secrets`, not in `settings`, which whoever may look at a pod can read." $name) }}
{{- end }}
{{- end }}
{{- $chosen := include "llm-gateway.chosenVariables" . | fromYamlArray }}
{{- range $name, $advice := include "llm-gateway.ownVariables" . | fromYaml }}
{{- if has $name $chosen }}
{{- fail (printf "`%s` is the chart's: %s." $name $advice) }}
{{- end }}
{{- end }}
{{- range $name := uniq $chosen }}
{{- if gt (sub (len $chosen) (len (without $chosen $name))) 1 }}
{{- fail (printf "`%s` comes twice in `settings`, `secrets` and `extraEnv`: set only one of them." $name) }}
{{- end }}
{{- end }}
{{- range $name, $advice := include "llm-gateway.ownFields" . | fromYaml }}
{{- if hasKey (default dict $.Values.podSpec) $name }}
{{- fail (printf "`podSpec.%s` is the chart's: %s." $name $advice) }}
{{- end }}
{{- end }}
{{- range $name := list "type" "ports" "selector" }}
{{- if hasKey (default dict $.Values.service.spec) $name }}
{{- fail (printf "`service.spec.%s` is the chart's: set `service`." $name) }}
{{- end }}
{{- end }}
{{- with .Values.podDisruptionBudget }}
{{- $pods := int (ternary $.Values.autoscaling.minReplicas (default 0 $.Values.replicas) $.Values.autoscaling.enabled) }}
{{- if and .enabled (gt $pods 0) }}
{{- $stay := 0 }}
{{- if kindIs "invalid" .minAvailable }}
{{- $stay = ternary $pods 0 (has (toString .maxUnavailable) (list "0" "0%")) }}
{{- else if kindIs "string" .minAvailable }}
{{- $stay = div (add (mul $pods (trimSuffix "%" .minAvailable | int)) 99) 100 }}
{{- else }}
{{- $stay = int .minAvailable }}
{{- end }}
{{- if ge (int $stay) $pods }}
{{- fail (printf "`podDisruptionBudget` lets nobody take a pod, so that a drain of its node never ends: of %d pods %d must stay. Set `maxUnavailable: 1`, or more pods." $pods (int $stay)) }}
{{- end }}
{{- end }}
{{- end }}
{{- with dig "limits" "memory" "" .Values.resources }}
{{- $buffered := int64 (default 268435456 (get $.Values.settings "GATEWAY_MAX_BUFFERED_BYTES")) }}
{{- $least := mul 3 $buffered }}
{{- if gt (int64 $.Values.workers) 1 }}{{ $least = add $least (mul 67108864 $.Values.workers) }}{{ end }}
{{- if lt (int64 (include "llm-gateway.bytes" .)) $least }}
{{- fail (printf "`resources.limits.memory` (%v) must be at least %dMi: three times GATEWAY_MAX_BUFFERED_BYTES (%d bytes), and 64Mi for each of several `workers`." . (div (add $least 1048575) 1048576) $buffered) }}
{{- end }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "`ingress.hosts` is empty." }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "`httpRoute.parentRefs` is empty: name the Gateway." }}
{{- end }}
{{- end }}

{{/* A setting as text: Helm reads numbers as floats, and would write 33554432 as 3.3554432e+07. */}}
{{- define "llm-gateway.plain" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end }}

{{/* The egress rule for the cluster's DNS. Policies see the port of its pods, which on OpenShift is 5353. */}}
{{- define "llm-gateway.dns" -}}
- to: [{namespaceSelector: {}}, {ipBlock: {cidr: 169.254.20.10/32}}] # NodeLocal DNSCache
  ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}, {protocol: UDP, port: 5353}, {protocol: TCP, port: 5353}]
{{- end }}

{{/* An egress rule to everywhere but the addresses at which clouds give out credentials: a list of ports. */}}
{{- define "llm-gateway.anywhere" -}}
- to:
    - namespaceSelector: {} # some networks do not count pods among the addresses below
    - ipBlock: {cidr: 0.0.0.0/0, except: [169.254.0.0/16, 168.63.129.16/32, 100.100.100.200/32]}
    - ipBlock: {cidr: "::/0", except: ["fe80::/10", "fd00:ec2::254/128", "fd20:ce::254/128"]}
  ports:
    {{- range . }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end }}

{{/* The ports of the backends that `config` names, and of `telemetry.endpoint`, as "443 8000"; of an existing ConfigMap nobody knows them: 443. */}}
{{- define "llm-gateway.ports" -}}
{{- $urls := list }}
{{- if .Values.existingConfigMap }}{{ $urls = list "https://backends" }}{{ end }}
{{- range .Values.config.backends }}{{ $urls = concat $urls (.urls | default list) (.url | default list | list | compact) }}{{ end }}
{{- with .Values.telemetry.endpoint }}{{ $urls = append $urls . }}{{ end }}
{{- $ports := list }}
{{- range $urls }}{{ $ports = append $ports (include "llm-gateway.portOf" .) }}{{ end }}
{{- $ports | uniq | sortAlpha | join " " }}
{{- end }}

{{/* The port of a url. */}}
{{- define "llm-gateway.portOf" -}}
{{- $parts := urlParse . -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $parts.host) | default (ternary "443" "80" (eq $parts.scheme "https")) -}}
{{- end }}

{{- define "llm-gateway.collectorConfig" -}}
{{- $host := include "llm-gateway.host" . }}
{{- if contains ":" $host }}{{ $host = printf "[%s]" $host }}{{ end -}}
extensions:
  health_check: {endpoint: "{{ $host }}:13133"}
receivers:
  otlp: {protocols: {http: {endpoint: "{{ $host }}:4318"}}}
processors:
  memory_limiter: {check_interval: 1s, limit_percentage: 80, spike_limit_percentage: 20}
exporters:
  {{- if .Values.collector.exportTo }}
  otlp_http:
    endpoint: {{ .Values.collector.exportTo }}
    timeout: 5s
    retry_on_failure: {initial_interval: 1s, max_interval: 5s, max_elapsed_time: 120s}
    sending_queue: {sizer: items, queue_size: 20000, batch: {flush_timeout: 200ms, min_size: 512, max_size: 2048}}
  {{- else }}
  debug: {verbosity: detailed}
  {{- end }}
service:
  extensions: [health_check]
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], processors: [memory_limiter], exporters: [{{ ternary "otlp_http" "debug" (ne .Values.collector.exportTo "") }}]}
{{- end }}
