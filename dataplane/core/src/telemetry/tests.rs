use super::access::{Access, Bytes};
use super::*;
use crate::identity::Identity;
use crate::state::ServiceName;
use std::sync::mpsc::{Receiver, channel};

struct Tell(std::sync::mpsc::Sender<Vec<u8>>);

impl Write for Tell {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(buf.to_vec());
        Ok(buf.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn side(name: &str) -> Side {
    Side {
        workload: format!("{name}-deploy").into(),
        canonical_service: name.into(),
        canonical_revision: "v1".into(),
        namespace: "shop".into(),
        principal: Some(Identity::new("cluster.local", "shop", name)),
        app: name.into(),
        version: "v1".into(),
        cluster: "Kubernetes".into(),
        region: Arc::default(),
        zone: Arc::default(),
    }
}

fn labels() -> Labels {
    Labels {
        reporter: Reporter::Source,
        source: side("web"),
        destination: side("db"),
        service: Some(ServiceName {
            name: "db".into(),
            namespace: "shop".into(),
            hostname: "db.shop.svc.cluster.local".into(),
        }),
        mtls: true,
    }
}

fn log_of(config: &pb::LogConfig, run: impl FnOnce(&Telemetry)) -> Vec<String> {
    let (output, lines): (_, Receiver<Vec<u8>>) = channel();
    let (telemetry, subscriber) = Telemetry::for_test(config, Box::new(Tell(output)));
    tracing::subscriber::with_default(subscriber, || run(&telemetry));
    telemetry.flush_log(Duration::from_secs(10));
    let all: Vec<u8> = lines.try_iter().flatten().collect();
    let text = String::from_utf8(all).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn access<'a>(labels: &'a Labels, direction: &'static str) -> Access<'a> {
    Access {
        direction,
        trace: &"4bf92f3577b34da6a3ce929d0e0e4736",
        src_addr: "10.0.0.1:4000".parse().unwrap(),
        src_workload: "web-1",
        dst_addr: "10.0.0.2:15008".parse().unwrap(),
        hbone_addr: Some("10.0.0.2:5432"),
        dst_workload: "db-0",
        labels,
        policy: None,
    }
}

const BYTES: Bytes = Bytes {
    from_client: 12,
    from_server: 3400,
};

#[test]
fn text_line_has_fields_in_upstreams_order() {
    let labels = labels();
    let lines = log_of(&pb::LogConfig::default(), |_| {
        access::complete(
            &access(&labels, "outbound"),
            BYTES,
            Duration::from_millis(13),
            None,
            false,
        );
    });
    let (time, rest) = lines[0].split_once('\t').unwrap();
    assert_eq!(time.len(), "2026-01-01T00:00:00.000000Z".len(), "{time}");
    assert!(time.ends_with('Z'));
    assert_eq!(
        rest,
        "info\taccess:outbound{id=4bf92f3577b34da6a3ce929d0e0e4736}\tconnection complete\t\
         src.addr=10.0.0.1:4000 src.workload=\"web-1\" src.namespace=\"shop\" \
         src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" src.cluster=\"Kubernetes\" \
         dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:5432 \
         dst.service=\"db.shop.svc.cluster.local\" dst.workload=\"db-0\" dst.namespace=\"shop\" \
         dst.identity=\"spiffe://cluster.local/ns/shop/sa/db\" dst.cluster=\"Kubernetes\" \
         direction=\"outbound\" bytes_sent=12 bytes_recv=3400 duration=\"13ms\""
    );
}

#[test]
fn inbound_counts_bytes_from_the_servers_side_and_names_error_and_policy() {
    let labels = labels();
    let lines = log_of(&pb::LogConfig::default(), |_| {
        let mut access = access(&labels, "inbound");
        access.policy = Some("shop/deny-web");
        access::complete(&access, BYTES, Duration::ZERO, Some("no \"luck\""), true);
    });
    let (_, rest) = lines[0].split_once('\t').unwrap();
    assert!(rest.starts_with("error\taccess:inbound{"), "{rest}");
    assert!(
        rest.ends_with(
            "direction=\"inbound\" bytes_sent=3400 bytes_recv=12 duration=\"0ms\" \
             error=\"no \\\"luck\\\"\" policy=\"shop/deny-web\""
        ),
        "{rest}"
    );
}

#[test]
fn json_line_is_json_with_upstreams_keys() {
    let labels = labels();
    let config = pb::LogConfig {
        format: pb::log_config::Format::Json.into(),
        ..Default::default()
    };
    let lines = log_of(&config, |_| {
        access::complete(
            &access(&labels, "outbound"),
            BYTES,
            Duration::from_millis(13),
            None,
            false,
        );
    });
    assert!(lines[0].starts_with("{\"level\":\"info\",\"time\":\""));
    let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!(line["scope"], "access");
    assert_eq!(line["message"], "connection complete");
    assert_eq!(line["src.addr"], "10.0.0.1:4000");
    assert_eq!(line["bytes_recv"], 3400);
    assert_eq!(line["duration"], "13ms");
    assert_eq!(line["outbound"]["id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert!(line.get("error").is_none());
}

#[test]
fn early_deny_is_a_warning_with_four_fields() {
    let lines = log_of(&pb::LogConfig::default(), |_| {
        access::failed(
            "outbound",
            "10.0.0.1:4000".parse().unwrap(),
            Some("127.0.0.1:15001".parse().unwrap()),
            "first\nsecond",
        );
    });
    assert_eq!(
        lines.len(),
        1,
        "a text from outside can't begin another line"
    );
    assert!(
        lines[0].ends_with(
            "warn\taccess\tconnection failed\tsrc.addr=10.0.0.1:4000 dst.addr=127.0.0.1:15001 \
             direction=\"outbound\" error=\"first\\nsecond\""
        ),
        "{}",
        lines[0]
    );
}

#[test]
fn quiet_keeps_errors_and_drops_good_ends() {
    let labels = labels();
    let lines = log_of(&pb::LogConfig::default(), |_| {
        let access = access(&labels, "outbound");
        access::complete(&access, BYTES, Duration::ZERO, None, true);
        access::complete(&access, BYTES, Duration::ZERO, Some("reset"), true);
    });
    assert_eq!(lines.len(), 1);
}

#[test]
fn levels_change_live_and_a_bad_filter_changes_nothing() {
    let labels = labels();
    let lines = log_of(&pb::LogConfig::default(), |telemetry| {
        let set = |filter: &str| {
            telemetry.configure(&pb::LogConfig {
                filter: filter.into(),
                ..Default::default()
            })
        };
        access::opened(&access(&labels, "outbound"));
        set("warn,access=debug").unwrap();
        access::opened(&access(&labels, "outbound"));
        let (_, error) = set("info,access=loud").unwrap_err();
        assert!(error.contains("access=loud"), "{error}");
        access::opened(&access(&labels, "outbound"));
        tracing::info!("below the level");
    });
    assert_eq!(lines.len(), 2);
    assert!(lines[0].contains("connection opened"));
}

#[test]
fn traffic_labels_are_printed_in_upstreams_order() {
    let telemetry = Telemetry::new(
        &pb::LogConfig::default(),
        &TelemetryConfig::default(),
        false,
    );
    let series = telemetry.metrics.traffic.series(labels());
    series.opened();
    series.add_bytes(12, 3400);
    series.closed(Flags::None);
    series.closed(Flags::Deny);
    let text = telemetry.encode();
    let row = |flags: &str| {
        format!(
            "{{reporter=\"source\",source_workload=\"web-deploy\",source_canonical_service=\"web\",\
             source_canonical_revision=\"v1\",source_workload_namespace=\"shop\",\
             source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",source_app=\"web\",\
             source_version=\"v1\",source_cluster=\"Kubernetes\",\
             destination_service=\"db.shop.svc.cluster.local\",\
             destination_service_namespace=\"shop\",destination_service_name=\"db\",\
             destination_workload=\"db-deploy\",destination_canonical_service=\"db\",\
             destination_canonical_revision=\"v1\",destination_workload_namespace=\"shop\",\
             destination_principal=\"spiffe://cluster.local/ns/shop/sa/db\",destination_app=\"db\",\
             destination_version=\"v1\",destination_cluster=\"Kubernetes\",request_protocol=\"tcp\",\
             response_flags=\"{flags}\",connection_security_policy=\"mutual_tls\"}}"
        )
    };
    for (name, flags, value) in [
        ("istio_tcp_connections_opened_total", "-", 1),
        ("istio_tcp_connections_closed_total", "-", 1),
        ("istio_tcp_connections_closed_total", "DENY", 1),
        ("istio_tcp_connections_failed_total", "DENY", 1),
        ("istio_tcp_received_bytes_total", "-", 12),
        ("istio_tcp_sent_bytes_total", "-", 3400),
    ] {
        let wanted = format!("{name}{} {value}\n", row(flags));
        assert!(text.contains(&wanted), "{wanted}\nnot in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn empty_values_are_unknown_and_localities_come_together() {
    let telemetry = Telemetry::new(
        &pb::LogConfig::default(),
        &TelemetryConfig::default(),
        false,
    );
    let mut labels = Labels {
        reporter: Reporter::Destination,
        source: Side::default(),
        destination: Side::default(),
        service: None,
        mtls: false,
    };
    telemetry.metrics.traffic.series(labels.clone()).opened();
    let text = telemetry.encode();
    assert!(text.contains("source_workload=\"unknown\""));
    assert!(text.contains("connection_security_policy=\"unknown\"}"));
    assert!(!text.contains("source_region"));
    labels.destination.zone = "z1".into();
    telemetry.metrics.traffic.series(labels).opened();
    assert!(telemetry.encode().contains(
        "source_region=\"unknown\",source_zone=\"unknown\",destination_region=\"unknown\",\
         destination_zone=\"z1\"}"
    ));
}

#[tokio::test]
async fn every_metric_that_may_change_says_unstable() {
    let telemetry = Telemetry::new(
        &pb::LogConfig::default(),
        &TelemetryConfig::default(),
        false,
    );
    telemetry.metrics.verdict(Some("shop/a"), false);
    telemetry.metrics.dry_run("shop/b", "would deny");
    telemetry.metrics.refusal("outbound", "no_route");
    let series = telemetry.metrics.traffic.series(labels());
    series.opened();
    series.closed(Flags::Connect);
    let text = telemetry.encode();
    // facts ztunnel 12.1: upstream's test knows the first five of these as stable.
    let stable = [
        "istio_build",
        "istio_tcp_connections_opened",
        "istio_tcp_connections_closed",
        "istio_tcp_received_bytes",
        "istio_tcp_sent_bytes",
        "process_open_fds",
        "process_max_fds",
    ];
    for line in text.lines().filter(|line| line.starts_with("# HELP")) {
        let name = line.split(' ').nth(2).unwrap();
        assert!(
            stable.contains(&name) || line.contains("unstable"),
            "{line}"
        );
    }
    assert!(text.contains("underpass_policy_verdicts_total{policy=\"shop/a\",verdict=\"deny\"} 1"));
    for sample in [
        "istio_build{component=\"ztunnel\",tag=\"unknown\"} 1",
        "istio_tcp_sockets_open{reporter=\"source\"} 0",
        "istio_tcp_sockets_open{reporter=\"destination\"} 0",
        "workload_manager_active_proxy_count 0",
        "workload_manager_proxies_started_total 0",
        "workload_manager_proxies_stopped_total 0",
        "process_open_fds ",
        "process_max_fds ",
        "tokio_num_workers 1",
        "tokio_num_alive_tasks ",
        "tokio_global_queue_depth ",
        "tokio_worker_total_busy_duration_seconds_total{worker=\"0\"} ",
        "tokio_worker_park_count_total{worker=\"0\"} ",
        "tokio_worker_park_unpark_count_total{worker=\"0\"} ",
        "underpass_log_lines_dropped_total 0",
    ] {
        let found = text.lines().any(|line| line.starts_with(sample));
        assert!(found, "{sample} not in\n{text}");
    }
}

#[test]
fn omitted_fields_are_left_out_of_both_formats_and_can_change_live() {
    for format in [pb::log_config::Format::Text, pb::log_config::Format::Json] {
        let labels = labels();
        let config = pb::LogConfig {
            format: format.into(),
            omit_fields: vec!["src.identity".into(), "bytes_sent".into()],
            ..Default::default()
        };
        let lines = log_of(&config, |telemetry| {
            let access = access(&labels, "outbound");
            access::complete(&access, BYTES, Duration::ZERO, None, false);
            telemetry.configure(&pb::LogConfig::default()).unwrap();
            access::complete(&access, BYTES, Duration::ZERO, None, false);
            let unknown = pb::LogConfig {
                omit_fields: vec!["src.adr".into()],
                ..Default::default()
            };
            let (field, text) = telemetry.configure(&unknown).unwrap_err();
            assert_eq!(field, "log.omit_fields");
            assert!(text.contains("`src.adr`") && text.contains("src.addr"));
        });
        for name in ["src.identity", "bytes_sent"] {
            assert!(!lines[0].contains(name), "{}", lines[0]);
            assert!(lines[1].contains(name), "{}", lines[1]);
        }
        assert!(lines[0].contains("dst.identity"), "{}", lines[0]);
    }
}

#[test]
fn every_field_of_the_access_log_can_be_omitted() {
    let labels = labels();
    let all = pb::LogConfig {
        omit_fields: access::FIELDS.iter().map(|name| (*name).into()).collect(),
        ..Default::default()
    };
    let lines = log_of(&all, |_| {
        let access = access(&labels, "outbound");
        access::complete(&access, BYTES, Duration::ZERO, Some("no"), false);
    });
    assert!(lines[0].ends_with("\tconnection complete"), "{}", lines[0]);
}

#[test]
fn one_good_end_in_so_many_is_told() {
    let telemetry = Telemetry::new(
        &pb::LogConfig {
            sample_one_in: 10,
            ..Default::default()
        },
        &TelemetryConfig::default(),
        false,
    );
    let told = || {
        (0..100)
            .filter(|_| telemetry.settings.tells_good_end())
            .count()
    };
    assert_eq!(told(), 10);
    telemetry.configure(&pb::LogConfig::default()).unwrap();
    assert_eq!(told(), 100);
    let off = pb::LogConfig {
        access_log_off: true,
        ..Default::default()
    };
    telemetry.configure(&off).unwrap();
    assert_eq!(told(), 0);
}

#[test]
fn lost_lines_are_told_in_the_logs_own_format() {
    let text = Format::Text.lost_lines()(7);
    assert!(
        text.ends_with("\twarn\ttelemetry\tlog lines lost: their reader is too slow\tlines=7\n"),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&Format::Json.lost_lines()(7)).unwrap();
    assert_eq!(json["lines"], 7);
}
