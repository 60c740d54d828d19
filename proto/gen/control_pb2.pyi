from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OriginalSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGINAL_SOURCE_AUTO: _ClassVar[OriginalSource]
    ORIGINAL_SOURCE_MUST: _ClassVar[OriginalSource]
    ORIGINAL_SOURCE_NEVER: _ClassVar[OriginalSource]

class Enforcement(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENFORCEMENT_OFF: _ClassVar[Enforcement]
    ENFORCEMENT_DRY_RUN: _ClassVar[Enforcement]
    ENFORCEMENT_ON: _ClassVar[Enforcement]
ORIGINAL_SOURCE_AUTO: OriginalSource
ORIGINAL_SOURCE_MUST: OriginalSource
ORIGINAL_SOURCE_NEVER: OriginalSource
ENFORCEMENT_OFF: Enforcement
ENFORCEMENT_DRY_RUN: Enforcement
ENFORCEMENT_ON: Enforcement

class Request(_message.Message):
    __slots__ = ("id", "fds", "hello", "add_pod", "update_pod", "remove_pod", "keep_pods", "pods_synced", "apply", "new_csr", "install_certificate", "fail_certificate", "list_connections", "get_metrics", "dump", "configure", "drain", "hand_over", "hand_over_done", "take_listeners", "list_pods", "set_trust", "explain", "list_verdicts", "list_policy_hits", "capture", "prove")
    ID_FIELD_NUMBER: _ClassVar[int]
    FDS_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ADD_POD_FIELD_NUMBER: _ClassVar[int]
    UPDATE_POD_FIELD_NUMBER: _ClassVar[int]
    REMOVE_POD_FIELD_NUMBER: _ClassVar[int]
    KEEP_PODS_FIELD_NUMBER: _ClassVar[int]
    PODS_SYNCED_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    NEW_CSR_FIELD_NUMBER: _ClassVar[int]
    INSTALL_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    FAIL_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    LIST_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    GET_METRICS_FIELD_NUMBER: _ClassVar[int]
    DUMP_FIELD_NUMBER: _ClassVar[int]
    CONFIGURE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_DONE_FIELD_NUMBER: _ClassVar[int]
    TAKE_LISTENERS_FIELD_NUMBER: _ClassVar[int]
    LIST_PODS_FIELD_NUMBER: _ClassVar[int]
    SET_TRUST_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    LIST_VERDICTS_FIELD_NUMBER: _ClassVar[int]
    LIST_POLICY_HITS_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    PROVE_FIELD_NUMBER: _ClassVar[int]
    id: int
    fds: int
    hello: Hello
    add_pod: AddPod
    update_pod: UpdatePod
    remove_pod: RemovePod
    keep_pods: KeepPods
    pods_synced: PodsSynced
    apply: Apply
    new_csr: NewCsr
    install_certificate: InstallCertificate
    fail_certificate: FailCertificate
    list_connections: ListConnections
    get_metrics: GetMetrics
    dump: Dump
    configure: Configure
    drain: Drain
    hand_over: HandOver
    hand_over_done: HandOverDone
    take_listeners: TakeListeners
    list_pods: ListPods
    set_trust: SetTrust
    explain: Explain
    list_verdicts: ListVerdicts
    list_policy_hits: ListPolicyHits
    capture: Capture
    prove: Prove
    def __init__(self, id: _Optional[int] = ..., fds: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., add_pod: _Optional[_Union[AddPod, _Mapping]] = ..., update_pod: _Optional[_Union[UpdatePod, _Mapping]] = ..., remove_pod: _Optional[_Union[RemovePod, _Mapping]] = ..., keep_pods: _Optional[_Union[KeepPods, _Mapping]] = ..., pods_synced: _Optional[_Union[PodsSynced, _Mapping]] = ..., apply: _Optional[_Union[Apply, _Mapping]] = ..., new_csr: _Optional[_Union[NewCsr, _Mapping]] = ..., install_certificate: _Optional[_Union[InstallCertificate, _Mapping]] = ..., fail_certificate: _Optional[_Union[FailCertificate, _Mapping]] = ..., list_connections: _Optional[_Union[ListConnections, _Mapping]] = ..., get_metrics: _Optional[_Union[GetMetrics, _Mapping]] = ..., dump: _Optional[_Union[Dump, _Mapping]] = ..., configure: _Optional[_Union[Configure, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ..., hand_over_done: _Optional[_Union[HandOverDone, _Mapping]] = ..., take_listeners: _Optional[_Union[TakeListeners, _Mapping]] = ..., list_pods: _Optional[_Union[ListPods, _Mapping]] = ..., set_trust: _Optional[_Union[SetTrust, _Mapping]] = ..., explain: _Optional[_Union[Explain, _Mapping]] = ..., list_verdicts: _Optional[_Union[ListVerdicts, _Mapping]] = ..., list_policy_hits: _Optional[_Union[ListPolicyHits, _Mapping]] = ..., capture: _Optional[_Union[Capture, _Mapping]] = ..., prove: _Optional[_Union[Prove, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("id", "fds", "more", "error", "done", "hello", "apply", "new_csr", "connections", "chunk", "listeners", "pods", "certificate", "explain", "verdicts", "policy_hits", "capture", "prove", "event")
    ID_FIELD_NUMBER: _ClassVar[int]
    FDS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    NEW_CSR_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LISTENERS_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    POLICY_HITS_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    PROVE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    fds: int
    more: bool
    error: Error
    done: Done
    hello: HelloReply
    apply: ApplyReply
    new_csr: NewCsrReply
    connections: ConnectionsReply
    chunk: Chunk
    listeners: HandOverListeners
    pods: PodsReply
    certificate: InstallCertificateReply
    explain: ExplainReply
    verdicts: VerdictsReply
    policy_hits: PolicyHitsReply
    capture: CaptureReply
    prove: ProveReply
    event: Event
    def __init__(self, id: _Optional[int] = ..., fds: _Optional[int] = ..., more: _Optional[bool] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., hello: _Optional[_Union[HelloReply, _Mapping]] = ..., apply: _Optional[_Union[ApplyReply, _Mapping]] = ..., new_csr: _Optional[_Union[NewCsrReply, _Mapping]] = ..., connections: _Optional[_Union[ConnectionsReply, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., listeners: _Optional[_Union[HandOverListeners, _Mapping]] = ..., pods: _Optional[_Union[PodsReply, _Mapping]] = ..., certificate: _Optional[_Union[InstallCertificateReply, _Mapping]] = ..., explain: _Optional[_Union[ExplainReply, _Mapping]] = ..., verdicts: _Optional[_Union[VerdictsReply, _Mapping]] = ..., policy_hits: _Optional[_Union[PolicyHitsReply, _Mapping]] = ..., capture: _Optional[_Union[CaptureReply, _Mapping]] = ..., prove: _Optional[_Union[ProveReply, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "subject", "text")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Error.Code]
        INVALID: _ClassVar[Error.Code]
        NOT_FOUND: _ClassVar[Error.Code]
        IN_USE: _ClassVar[Error.Code]
        PERMISSION: _ClassVar[Error.Code]
        VERSION: _ClassVar[Error.Code]
        NETNS_GONE: _ClassVar[Error.Code]
        INTERNAL: _ClassVar[Error.Code]
        DRAINING: _ClassVar[Error.Code]
    UNSPECIFIED: Error.Code
    INVALID: Error.Code
    NOT_FOUND: Error.Code
    IN_USE: Error.Code
    PERMISSION: Error.Code
    VERSION: Error.Code
    NETNS_GONE: Error.Code
    INTERNAL: Error.Code
    DRAINING: Error.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: Error.Code
    subject: str
    text: str
    def __init__(self, code: _Optional[_Union[Error.Code, str]] = ..., subject: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("role", "version", "config")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        AGENT: _ClassVar[Hello.Role]
        OBSERVER: _ClassVar[Hello.Role]
        SUCCESSOR: _ClassVar[Hello.Role]
    AGENT: Hello.Role
    OBSERVER: Hello.Role
    SUCCESSOR: Hello.Role
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    role: Hello.Role
    version: int
    config: InstanceConfig
    def __init__(self, role: _Optional[_Union[Hello.Role, str]] = ..., version: _Optional[int] = ..., config: _Optional[_Union[InstanceConfig, _Mapping]] = ...) -> None: ...

class InstanceConfig(_message.Message):
    __slots__ = ("node", "network", "cluster_id", "trust_domain", "outbound_port", "inbound_plaintext_port", "inbound_hbone_port", "log", "limits", "mark", "ipv6_disabled", "dns_port", "dns", "socks5_port", "on_demand", "original_source", "localhost_app_tunnel_off", "response_baggage_off", "http2", "keepalive", "telemetry", "ebpf", "kubelet_probe_fallback")
    NODE_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    TRUST_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    OUTBOUND_PORT_FIELD_NUMBER: _ClassVar[int]
    INBOUND_PLAINTEXT_PORT_FIELD_NUMBER: _ClassVar[int]
    INBOUND_HBONE_PORT_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    IPV6_DISABLED_FIELD_NUMBER: _ClassVar[int]
    DNS_PORT_FIELD_NUMBER: _ClassVar[int]
    DNS_FIELD_NUMBER: _ClassVar[int]
    SOCKS5_PORT_FIELD_NUMBER: _ClassVar[int]
    ON_DEMAND_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_SOURCE_FIELD_NUMBER: _ClassVar[int]
    LOCALHOST_APP_TUNNEL_OFF_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_BAGGAGE_OFF_FIELD_NUMBER: _ClassVar[int]
    HTTP2_FIELD_NUMBER: _ClassVar[int]
    KEEPALIVE_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    EBPF_FIELD_NUMBER: _ClassVar[int]
    KUBELET_PROBE_FALLBACK_FIELD_NUMBER: _ClassVar[int]
    node: str
    network: str
    cluster_id: str
    trust_domain: str
    outbound_port: int
    inbound_plaintext_port: int
    inbound_hbone_port: int
    log: LogConfig
    limits: Limits
    mark: int
    ipv6_disabled: bool
    dns_port: int
    dns: Dns
    socks5_port: int
    on_demand: bool
    original_source: OriginalSource
    localhost_app_tunnel_off: bool
    response_baggage_off: bool
    http2: Http2
    keepalive: Keepalive
    telemetry: Telemetry
    ebpf: Ebpf
    kubelet_probe_fallback: bool
    def __init__(self, node: _Optional[str] = ..., network: _Optional[str] = ..., cluster_id: _Optional[str] = ..., trust_domain: _Optional[str] = ..., outbound_port: _Optional[int] = ..., inbound_plaintext_port: _Optional[int] = ..., inbound_hbone_port: _Optional[int] = ..., log: _Optional[_Union[LogConfig, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., mark: _Optional[int] = ..., ipv6_disabled: _Optional[bool] = ..., dns_port: _Optional[int] = ..., dns: _Optional[_Union[Dns, _Mapping]] = ..., socks5_port: _Optional[int] = ..., on_demand: _Optional[bool] = ..., original_source: _Optional[_Union[OriginalSource, str]] = ..., localhost_app_tunnel_off: _Optional[bool] = ..., response_baggage_off: _Optional[bool] = ..., http2: _Optional[_Union[Http2, _Mapping]] = ..., keepalive: _Optional[_Union[Keepalive, _Mapping]] = ..., telemetry: _Optional[_Union[Telemetry, _Mapping]] = ..., ebpf: _Optional[_Union[Ebpf, _Mapping]] = ..., kubelet_probe_fallback: _Optional[bool] = ...) -> None: ...

class Ebpf(_message.Message):
    __slots__ = ("pods_cgroup", "folder", "pod_max_pending", "kubelet_cgroup")
    PODS_CGROUP_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    POD_MAX_PENDING_FIELD_NUMBER: _ClassVar[int]
    KUBELET_CGROUP_FIELD_NUMBER: _ClassVar[int]
    pods_cgroup: str
    folder: str
    pod_max_pending: int
    kubelet_cgroup: str
    def __init__(self, pods_cgroup: _Optional[str] = ..., folder: _Optional[str] = ..., pod_max_pending: _Optional[int] = ..., kubelet_cgroup: _Optional[str] = ...) -> None: ...

class Dns(_message.Message):
    __slots__ = ("cluster_domain", "nameservers", "preferred_namespace", "forward_timeout_ms", "cache_entries", "pod_max_pending")
    CLUSTER_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    NAMESERVERS_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    POD_MAX_PENDING_FIELD_NUMBER: _ClassVar[int]
    cluster_domain: str
    nameservers: _containers.RepeatedScalarFieldContainer[str]
    preferred_namespace: str
    forward_timeout_ms: int
    cache_entries: int
    pod_max_pending: int
    def __init__(self, cluster_domain: _Optional[str] = ..., nameservers: _Optional[_Iterable[str]] = ..., preferred_namespace: _Optional[str] = ..., forward_timeout_ms: _Optional[int] = ..., cache_entries: _Optional[int] = ..., pod_max_pending: _Optional[int] = ...) -> None: ...

class Http2(_message.Message):
    __slots__ = ("stream_window", "connection_window", "frame_size")
    STREAM_WINDOW_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_WINDOW_FIELD_NUMBER: _ClassVar[int]
    FRAME_SIZE_FIELD_NUMBER: _ClassVar[int]
    stream_window: int
    connection_window: int
    frame_size: int
    def __init__(self, stream_window: _Optional[int] = ..., connection_window: _Optional[int] = ..., frame_size: _Optional[int] = ...) -> None: ...

class Keepalive(_message.Message):
    __slots__ = ("off", "time_s", "interval_s", "retries", "user_timeout")
    OFF_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    USER_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    off: bool
    time_s: int
    interval_s: int
    retries: int
    user_timeout: bool
    def __init__(self, off: _Optional[bool] = ..., time_s: _Optional[int] = ..., interval_s: _Optional[int] = ..., retries: _Optional[int] = ..., user_timeout: _Optional[bool] = ...) -> None: ...

class Telemetry(_message.Message):
    __slots__ = ("otlp_endpoint", "series_ttl_ms", "istio_version")
    OTLP_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    SERIES_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ISTIO_VERSION_FIELD_NUMBER: _ClassVar[int]
    otlp_endpoint: str
    series_ttl_ms: int
    istio_version: str
    def __init__(self, otlp_endpoint: _Optional[str] = ..., series_ttl_ms: _Optional[int] = ..., istio_version: _Optional[str] = ...) -> None: ...

class LogConfig(_message.Message):
    __slots__ = ("format", "filter", "access_log_off", "omit_fields", "sample_one_in", "queue_lines", "policy_decisions")
    class Format(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TEXT: _ClassVar[LogConfig.Format]
        JSON: _ClassVar[LogConfig.Format]
    TEXT: LogConfig.Format
    JSON: LogConfig.Format
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ACCESS_LOG_OFF_FIELD_NUMBER: _ClassVar[int]
    OMIT_FIELDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ONE_IN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LINES_FIELD_NUMBER: _ClassVar[int]
    POLICY_DECISIONS_FIELD_NUMBER: _ClassVar[int]
    format: LogConfig.Format
    filter: str
    access_log_off: bool
    omit_fields: _containers.RepeatedScalarFieldContainer[str]
    sample_one_in: int
    queue_lines: int
    policy_decisions: bool
    def __init__(self, format: _Optional[_Union[LogConfig.Format, str]] = ..., filter: _Optional[str] = ..., access_log_off: _Optional[bool] = ..., omit_fields: _Optional[_Iterable[str]] = ..., sample_one_in: _Optional[int] = ..., queue_lines: _Optional[int] = ..., policy_decisions: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("connect_timeout_ms", "tls_handshake_timeout_ms", "connect_answer_timeout_ms", "workload_wait_ms", "pool_max_streams", "pool_idle_ms", "pool_max_tunnels", "pod_max_connections", "drain_deadline_ms", "preface_timeout_ms", "pod_max_handshakes")
    CONNECT_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TLS_HANDSHAKE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    CONNECT_ANSWER_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    POOL_MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    POOL_IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    POOL_MAX_TUNNELS_FIELD_NUMBER: _ClassVar[int]
    POD_MAX_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFACE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    POD_MAX_HANDSHAKES_FIELD_NUMBER: _ClassVar[int]
    connect_timeout_ms: int
    tls_handshake_timeout_ms: int
    connect_answer_timeout_ms: int
    workload_wait_ms: int
    pool_max_streams: int
    pool_idle_ms: int
    pool_max_tunnels: int
    pod_max_connections: int
    drain_deadline_ms: int
    preface_timeout_ms: int
    pod_max_handshakes: int
    def __init__(self, connect_timeout_ms: _Optional[int] = ..., tls_handshake_timeout_ms: _Optional[int] = ..., connect_answer_timeout_ms: _Optional[int] = ..., workload_wait_ms: _Optional[int] = ..., pool_max_streams: _Optional[int] = ..., pool_idle_ms: _Optional[int] = ..., pool_max_tunnels: _Optional[int] = ..., pod_max_connections: _Optional[int] = ..., drain_deadline_ms: _Optional[int] = ..., preface_timeout_ms: _Optional[int] = ..., pod_max_handshakes: _Optional[int] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("version", "instance_id", "pid", "cgroup", "config", "pods", "certificates", "types", "build", "draining", "synced")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CGROUP_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SYNCED_FIELD_NUMBER: _ClassVar[int]
    version: int
    instance_id: str
    pid: int
    cgroup: str
    config: InstanceConfig
    pods: _containers.RepeatedCompositeFieldContainer[PodStatus]
    certificates: _containers.RepeatedCompositeFieldContainer[CertificateStatus]
    types: _containers.RepeatedCompositeFieldContainer[TypeState]
    build: str
    draining: bool
    synced: bool
    def __init__(self, version: _Optional[int] = ..., instance_id: _Optional[str] = ..., pid: _Optional[int] = ..., cgroup: _Optional[str] = ..., config: _Optional[_Union[InstanceConfig, _Mapping]] = ..., pods: _Optional[_Iterable[_Union[PodStatus, _Mapping]]] = ..., certificates: _Optional[_Iterable[_Union[CertificateStatus, _Mapping]]] = ..., types: _Optional[_Iterable[_Union[TypeState, _Mapping]]] = ..., build: _Optional[str] = ..., draining: _Optional[bool] = ..., synced: _Optional[bool] = ...) -> None: ...

class TypeState(_message.Message):
    __slots__ = ("type_url", "processed", "versions", "rejected")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RejectedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    type_url: str
    processed: bool
    versions: _containers.ScalarMap[str, str]
    rejected: _containers.ScalarMap[str, str]
    def __init__(self, type_url: _Optional[str] = ..., processed: _Optional[bool] = ..., versions: _Optional[_Mapping[str, str]] = ..., rejected: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Pod(_message.Message):
    __slots__ = ("uid", "name", "namespace", "service_account")
    UID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    uid: str
    name: str
    namespace: str
    service_account: str
    def __init__(self, uid: _Optional[str] = ..., name: _Optional[str] = ..., namespace: _Optional[str] = ..., service_account: _Optional[str] = ...) -> None: ...

class PodSettings(_message.Message):
    __slots__ = ("capture", "addresses", "dns", "bypass_inbound", "probe_ports", "virtual_interfaces", "resolv_conf", "registry_only", "waypoint_required", "cgroup", "udp_deny", "only_ports")
    class Capture(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NFTABLES: _ClassVar[PodSettings.Capture]
        EXTERNAL: _ClassVar[PodSettings.Capture]
        NONE: _ClassVar[PodSettings.Capture]
        EBPF: _ClassVar[PodSettings.Capture]
    NFTABLES: PodSettings.Capture
    EXTERNAL: PodSettings.Capture
    NONE: PodSettings.Capture
    EBPF: PodSettings.Capture
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    DNS_FIELD_NUMBER: _ClassVar[int]
    BYPASS_INBOUND_FIELD_NUMBER: _ClassVar[int]
    PROBE_PORTS_FIELD_NUMBER: _ClassVar[int]
    VIRTUAL_INTERFACES_FIELD_NUMBER: _ClassVar[int]
    RESOLV_CONF_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_ONLY_FIELD_NUMBER: _ClassVar[int]
    WAYPOINT_REQUIRED_FIELD_NUMBER: _ClassVar[int]
    CGROUP_FIELD_NUMBER: _ClassVar[int]
    UDP_DENY_FIELD_NUMBER: _ClassVar[int]
    ONLY_PORTS_FIELD_NUMBER: _ClassVar[int]
    capture: PodSettings.Capture
    addresses: _containers.RepeatedScalarFieldContainer[str]
    dns: bool
    bypass_inbound: bool
    probe_ports: _containers.RepeatedScalarFieldContainer[int]
    virtual_interfaces: _containers.RepeatedScalarFieldContainer[str]
    resolv_conf: ResolvConf
    registry_only: Enforcement
    waypoint_required: Enforcement
    cgroup: str
    udp_deny: bool
    only_ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, capture: _Optional[_Union[PodSettings.Capture, str]] = ..., addresses: _Optional[_Iterable[str]] = ..., dns: _Optional[bool] = ..., bypass_inbound: _Optional[bool] = ..., probe_ports: _Optional[_Iterable[int]] = ..., virtual_interfaces: _Optional[_Iterable[str]] = ..., resolv_conf: _Optional[_Union[ResolvConf, _Mapping]] = ..., registry_only: _Optional[_Union[Enforcement, str]] = ..., waypoint_required: _Optional[_Union[Enforcement, str]] = ..., cgroup: _Optional[str] = ..., udp_deny: _Optional[bool] = ..., only_ports: _Optional[_Iterable[int]] = ...) -> None: ...

class ResolvConf(_message.Message):
    __slots__ = ("nameservers", "search", "ndots")
    NAMESERVERS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    NDOTS_FIELD_NUMBER: _ClassVar[int]
    nameservers: _containers.RepeatedScalarFieldContainer[str]
    search: _containers.RepeatedScalarFieldContainer[str]
    ndots: int
    def __init__(self, nameservers: _Optional[_Iterable[str]] = ..., search: _Optional[_Iterable[str]] = ..., ndots: _Optional[int] = ...) -> None: ...

class AddPod(_message.Message):
    __slots__ = ("pod", "settings", "prepare_only")
    POD_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    PREPARE_ONLY_FIELD_NUMBER: _ClassVar[int]
    pod: Pod
    settings: PodSettings
    prepare_only: bool
    def __init__(self, pod: _Optional[_Union[Pod, _Mapping]] = ..., settings: _Optional[_Union[PodSettings, _Mapping]] = ..., prepare_only: _Optional[bool] = ...) -> None: ...

class UpdatePod(_message.Message):
    __slots__ = ("uid", "settings")
    UID_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    uid: str
    settings: PodSettings
    def __init__(self, uid: _Optional[str] = ..., settings: _Optional[_Union[PodSettings, _Mapping]] = ...) -> None: ...

class Capture(_message.Message):
    __slots__ = ("install", "verify", "remove", "list", "datagrams")
    INSTALL_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    DATAGRAMS_FIELD_NUMBER: _ClassVar[int]
    install: str
    verify: str
    remove: str
    list: str
    datagrams: str
    def __init__(self, install: _Optional[str] = ..., verify: _Optional[str] = ..., remove: _Optional[str] = ..., list: _Optional[str] = ..., datagrams: _Optional[str] = ...) -> None: ...

class CaptureReply(_message.Message):
    __slots__ = ("problems", "captured", "reasons", "datagrams")
    class Datagrams(_message.Message):
        __slots__ = ("refused", "unprotected")
        REFUSED_FIELD_NUMBER: _ClassVar[int]
        UNPROTECTED_FIELD_NUMBER: _ClassVar[int]
        refused: int
        unprotected: int
        def __init__(self, refused: _Optional[int] = ..., unprotected: _Optional[int] = ...) -> None: ...
    class Reason(_message.Message):
        __slots__ = ("number", "name", "text", "count")
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        number: int
        name: str
        text: str
        count: int
        def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., text: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    DATAGRAMS_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedScalarFieldContainer[str]
    captured: bool
    reasons: _containers.RepeatedCompositeFieldContainer[CaptureReply.Reason]
    datagrams: CaptureReply.Datagrams
    def __init__(self, problems: _Optional[_Iterable[str]] = ..., captured: _Optional[bool] = ..., reasons: _Optional[_Iterable[_Union[CaptureReply.Reason, _Mapping]]] = ..., datagrams: _Optional[_Union[CaptureReply.Datagrams, _Mapping]] = ...) -> None: ...

class Prove(_message.Message):
    __slots__ = ("expected", "arrived")
    class Expected(_message.Message):
        __slots__ = ("uid", "outbound", "inbound")
        UID_FIELD_NUMBER: _ClassVar[int]
        OUTBOUND_FIELD_NUMBER: _ClassVar[int]
        INBOUND_FIELD_NUMBER: _ClassVar[int]
        uid: str
        outbound: _containers.RepeatedScalarFieldContainer[bytes]
        inbound: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, uid: _Optional[str] = ..., outbound: _Optional[_Iterable[bytes]] = ..., inbound: _Optional[_Iterable[bytes]] = ...) -> None: ...
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    expected: _containers.RepeatedCompositeFieldContainer[Prove.Expected]
    arrived: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, expected: _Optional[_Iterable[_Union[Prove.Expected, _Mapping]]] = ..., arrived: _Optional[_Iterable[str]] = ...) -> None: ...

class ProveReply(_message.Message):
    __slots__ = ("arrived",)
    class Arrived(_message.Message):
        __slots__ = ("uid", "nonces")
        UID_FIELD_NUMBER: _ClassVar[int]
        NONCES_FIELD_NUMBER: _ClassVar[int]
        uid: str
        nonces: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, uid: _Optional[str] = ..., nonces: _Optional[_Iterable[bytes]] = ...) -> None: ...
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    arrived: _containers.RepeatedCompositeFieldContainer[ProveReply.Arrived]
    def __init__(self, arrived: _Optional[_Iterable[_Union[ProveReply.Arrived, _Mapping]]] = ...) -> None: ...

class RemovePod(_message.Message):
    __slots__ = ("uid", "drain", "deadline_ms")
    UID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    uid: str
    drain: bool
    deadline_ms: int
    def __init__(self, uid: _Optional[str] = ..., drain: _Optional[bool] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class KeepPods(_message.Message):
    __slots__ = ("uids",)
    UIDS_FIELD_NUMBER: _ClassVar[int]
    uids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, uids: _Optional[_Iterable[str]] = ...) -> None: ...

class PodsSynced(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPods(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PodsReply(_message.Message):
    __slots__ = ("pods",)
    PODS_FIELD_NUMBER: _ClassVar[int]
    pods: _containers.RepeatedCompositeFieldContainer[PodStatus]
    def __init__(self, pods: _Optional[_Iterable[_Union[PodStatus, _Mapping]]] = ...) -> None: ...

class PodStatus(_message.Message):
    __slots__ = ("pod", "state", "settings", "netns_inode", "netns_dev", "workload_uid", "identity", "inbound_connections", "outbound_connections")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PREPARED: _ClassVar[PodStatus.State]
        UP: _ClassVar[PodStatus.State]
        DRAINING: _ClassVar[PodStatus.State]
    PREPARED: PodStatus.State
    UP: PodStatus.State
    DRAINING: PodStatus.State
    POD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    NETNS_INODE_FIELD_NUMBER: _ClassVar[int]
    NETNS_DEV_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_UID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    INBOUND_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    OUTBOUND_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    pod: Pod
    state: PodStatus.State
    settings: PodSettings
    netns_inode: int
    netns_dev: int
    workload_uid: str
    identity: str
    inbound_connections: int
    outbound_connections: int
    def __init__(self, pod: _Optional[_Union[Pod, _Mapping]] = ..., state: _Optional[_Union[PodStatus.State, str]] = ..., settings: _Optional[_Union[PodSettings, _Mapping]] = ..., netns_inode: _Optional[int] = ..., netns_dev: _Optional[int] = ..., workload_uid: _Optional[str] = ..., identity: _Optional[str] = ..., inbound_connections: _Optional[int] = ..., outbound_connections: _Optional[int] = ...) -> None: ...

class Apply(_message.Message):
    __slots__ = ("response",)
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    response: bytes
    def __init__(self, response: _Optional[bytes] = ...) -> None: ...

class ApplyReply(_message.Message):
    __slots__ = ("type_url", "nonce", "rejected", "accepted", "removed")
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    type_url: str
    nonce: str
    rejected: _containers.RepeatedCompositeFieldContainer[Rejection]
    accepted: int
    removed: int
    def __init__(self, type_url: _Optional[str] = ..., nonce: _Optional[str] = ..., rejected: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., accepted: _Optional[int] = ..., removed: _Optional[int] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class NewCsr(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    def __init__(self, identity: _Optional[str] = ...) -> None: ...

class NewCsrReply(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: str
    def __init__(self, csr: _Optional[str] = ...) -> None: ...

class InstallCertificate(_message.Message):
    __slots__ = ("identity", "chain", "roots", "private_key")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_KEY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    chain: _containers.RepeatedScalarFieldContainer[str]
    roots: _containers.RepeatedScalarFieldContainer[str]
    private_key: bytes
    def __init__(self, identity: _Optional[str] = ..., chain: _Optional[_Iterable[str]] = ..., roots: _Optional[_Iterable[str]] = ..., private_key: _Optional[bytes] = ...) -> None: ...

class InstallCertificateReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: CertificateStatus
    def __init__(self, certificate: _Optional[_Union[CertificateStatus, _Mapping]] = ...) -> None: ...

class FailCertificate(_message.Message):
    __slots__ = ("identity", "text")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    identity: str
    text: str
    def __init__(self, identity: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class SetTrust(_message.Message):
    __slots__ = ("crl", "trust_domain_aliases", "compliance_policy", "additional_roots")
    CRL_FIELD_NUMBER: _ClassVar[int]
    TRUST_DOMAIN_ALIASES_FIELD_NUMBER: _ClassVar[int]
    COMPLIANCE_POLICY_FIELD_NUMBER: _ClassVar[int]
    ADDITIONAL_ROOTS_FIELD_NUMBER: _ClassVar[int]
    crl: bytes
    trust_domain_aliases: _containers.RepeatedScalarFieldContainer[str]
    compliance_policy: str
    additional_roots: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, crl: _Optional[bytes] = ..., trust_domain_aliases: _Optional[_Iterable[str]] = ..., compliance_policy: _Optional[str] = ..., additional_roots: _Optional[_Iterable[str]] = ...) -> None: ...

class CertificateStatus(_message.Message):
    __slots__ = ("identity", "not_before", "not_after", "serial", "error")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    identity: str
    not_before: int
    not_after: int
    serial: str
    error: str
    def __init__(self, identity: _Optional[str] = ..., not_before: _Optional[int] = ..., not_after: _Optional[int] = ..., serial: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class ListConnections(_message.Message):
    __slots__ = ("pod_uid",)
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    pod_uid: str
    def __init__(self, pod_uid: _Optional[str] = ...) -> None: ...

class Connection(_message.Message):
    __slots__ = ("id", "pod_uid", "direction", "src", "original_dst", "actual_dst", "protocol", "src_identity", "dst_identity", "dst_service", "age_ms", "bytes_sent", "bytes_received", "src_workload", "dst_workload")
    class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        INBOUND: _ClassVar[Connection.Direction]
        OUTBOUND: _ClassVar[Connection.Direction]
    INBOUND: Connection.Direction
    OUTBOUND: Connection.Direction
    ID_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    SRC_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_DST_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_DST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SRC_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DST_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DST_SERVICE_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SRC_WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    DST_WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    id: int
    pod_uid: str
    direction: Connection.Direction
    src: str
    original_dst: str
    actual_dst: str
    protocol: str
    src_identity: str
    dst_identity: str
    dst_service: str
    age_ms: int
    bytes_sent: int
    bytes_received: int
    src_workload: str
    dst_workload: str
    def __init__(self, id: _Optional[int] = ..., pod_uid: _Optional[str] = ..., direction: _Optional[_Union[Connection.Direction, str]] = ..., src: _Optional[str] = ..., original_dst: _Optional[str] = ..., actual_dst: _Optional[str] = ..., protocol: _Optional[str] = ..., src_identity: _Optional[str] = ..., dst_identity: _Optional[str] = ..., dst_service: _Optional[str] = ..., age_ms: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., src_workload: _Optional[str] = ..., dst_workload: _Optional[str] = ...) -> None: ...

class ConnectionsReply(_message.Message):
    __slots__ = ("connections",)
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    connections: _containers.RepeatedCompositeFieldContainer[Connection]
    def __init__(self, connections: _Optional[_Iterable[_Union[Connection, _Mapping]]] = ...) -> None: ...

class GetMetrics(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Dump(_message.Message):
    __slots__ = ("section",)
    SECTION_FIELD_NUMBER: _ClassVar[int]
    section: str
    def __init__(self, section: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Explain(_message.Message):
    __slots__ = ("source", "destination")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    source: str
    destination: str
    def __init__(self, source: _Optional[str] = ..., destination: _Optional[str] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("steps", "allowed", "verdict", "remedy")
    class Step(_message.Message):
        __slots__ = ("name", "outcome", "text", "subject")
        class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            OK: _ClassVar[ExplainReply.Step.Outcome]
            REFUSED: _ClassVar[ExplainReply.Step.Outcome]
            UNKNOWN: _ClassVar[ExplainReply.Step.Outcome]
            DRY_RUN: _ClassVar[ExplainReply.Step.Outcome]
        OK: ExplainReply.Step.Outcome
        REFUSED: ExplainReply.Step.Outcome
        UNKNOWN: ExplainReply.Step.Outcome
        DRY_RUN: ExplainReply.Step.Outcome
        NAME_FIELD_NUMBER: _ClassVar[int]
        OUTCOME_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        SUBJECT_FIELD_NUMBER: _ClassVar[int]
        name: str
        outcome: ExplainReply.Step.Outcome
        text: str
        subject: str
        def __init__(self, name: _Optional[str] = ..., outcome: _Optional[_Union[ExplainReply.Step.Outcome, str]] = ..., text: _Optional[str] = ..., subject: _Optional[str] = ...) -> None: ...
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[ExplainReply.Step]
    allowed: bool
    verdict: str
    remedy: str
    def __init__(self, steps: _Optional[_Iterable[_Union[ExplainReply.Step, _Mapping]]] = ..., allowed: _Optional[bool] = ..., verdict: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class ListVerdicts(_message.Message):
    __slots__ = ("pod_uid", "limit")
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    pod_uid: str
    limit: int
    def __init__(self, pod_uid: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("time_ms", "pod_uid", "direction", "src", "dst", "src_identity", "src_workload", "dst_workload", "dst_service", "flag", "cause", "policy", "rule", "count", "remedy")
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    SRC_FIELD_NUMBER: _ClassVar[int]
    DST_FIELD_NUMBER: _ClassVar[int]
    SRC_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SRC_WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    DST_WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    DST_SERVICE_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    time_ms: int
    pod_uid: str
    direction: Connection.Direction
    src: str
    dst: str
    src_identity: str
    src_workload: str
    dst_workload: str
    dst_service: str
    flag: str
    cause: str
    policy: str
    rule: int
    count: int
    remedy: str
    def __init__(self, time_ms: _Optional[int] = ..., pod_uid: _Optional[str] = ..., direction: _Optional[_Union[Connection.Direction, str]] = ..., src: _Optional[str] = ..., dst: _Optional[str] = ..., src_identity: _Optional[str] = ..., src_workload: _Optional[str] = ..., dst_workload: _Optional[str] = ..., dst_service: _Optional[str] = ..., flag: _Optional[str] = ..., cause: _Optional[str] = ..., policy: _Optional[str] = ..., rule: _Optional[int] = ..., count: _Optional[int] = ..., remedy: _Optional[str] = ...) -> None: ...

class VerdictsReply(_message.Message):
    __slots__ = ("verdicts", "lost")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    lost: int
    def __init__(self, verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., lost: _Optional[int] = ...) -> None: ...

class ListPolicyHits(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PolicyHitsReply(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyHits]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicyHits, _Mapping]]] = ...) -> None: ...

class PolicyHits(_message.Message):
    __slots__ = ("name", "decided", "dry_run", "last_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LAST_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    decided: int
    dry_run: int
    last_ms: int
    def __init__(self, name: _Optional[str] = ..., decided: _Optional[int] = ..., dry_run: _Optional[int] = ..., last_ms: _Optional[int] = ...) -> None: ...

class Configure(_message.Message):
    __slots__ = ("log", "limits")
    LOG_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    log: LogConfig
    limits: Limits
    def __init__(self, log: _Optional[_Union[LogConfig, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("deadline_ms", "exit")
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    exit: bool
    def __init__(self, deadline_ms: _Optional[int] = ..., exit: _Optional[bool] = ...) -> None: ...

class HandOver(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HandOverListeners(_message.Message):
    __slots__ = ("pod_uid", "ports")
    POD_UID_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    pod_uid: str
    ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pod_uid: _Optional[str] = ..., ports: _Optional[_Iterable[int]] = ...) -> None: ...

class HandOverDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TakeListeners(_message.Message):
    __slots__ = ("socket",)
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    socket: str
    def __init__(self, socket: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("certificate_wanted", "certificate_forgotten", "first_response", "pod_drained", "listener_lost", "resource_wanted")
    CERTIFICATE_WANTED_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    POD_DRAINED_FIELD_NUMBER: _ClassVar[int]
    LISTENER_LOST_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_WANTED_FIELD_NUMBER: _ClassVar[int]
    certificate_wanted: CertificateWanted
    certificate_forgotten: CertificateForgotten
    first_response: FirstResponse
    pod_drained: PodDrained
    listener_lost: ListenerLost
    resource_wanted: ResourceWanted
    def __init__(self, certificate_wanted: _Optional[_Union[CertificateWanted, _Mapping]] = ..., certificate_forgotten: _Optional[_Union[CertificateForgotten, _Mapping]] = ..., first_response: _Optional[_Union[FirstResponse, _Mapping]] = ..., pod_drained: _Optional[_Union[PodDrained, _Mapping]] = ..., listener_lost: _Optional[_Union[ListenerLost, _Mapping]] = ..., resource_wanted: _Optional[_Union[ResourceWanted, _Mapping]] = ...) -> None: ...

class ResourceWanted(_message.Message):
    __slots__ = ("type_url", "name")
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    type_url: str
    name: str
    def __init__(self, type_url: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class CertificateWanted(_message.Message):
    __slots__ = ("identity", "priority")
    class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PREFETCH: _ClassVar[CertificateWanted.Priority]
        CONNECTION: _ClassVar[CertificateWanted.Priority]
    PREFETCH: CertificateWanted.Priority
    CONNECTION: CertificateWanted.Priority
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    priority: CertificateWanted.Priority
    def __init__(self, identity: _Optional[str] = ..., priority: _Optional[_Union[CertificateWanted.Priority, str]] = ...) -> None: ...

class CertificateForgotten(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    def __init__(self, identity: _Optional[str] = ...) -> None: ...

class FirstResponse(_message.Message):
    __slots__ = ("type_url",)
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    type_url: str
    def __init__(self, type_url: _Optional[str] = ...) -> None: ...

class PodDrained(_message.Message):
    __slots__ = ("uid",)
    UID_FIELD_NUMBER: _ClassVar[int]
    uid: str
    def __init__(self, uid: _Optional[str] = ...) -> None: ...

class ListenerLost(_message.Message):
    __slots__ = ("uid", "port", "text")
    UID_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    uid: str
    port: int
    text: str
    def __init__(self, uid: _Optional[str] = ..., port: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...
