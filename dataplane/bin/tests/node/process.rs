//! The real process, in its own cgroup.

use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};

use super::client::Client;
use super::{PATIENCE, eventually};

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Dataplane {
    child: Child,
    pub socket: PathBuf,
    pub cgroup: PathBuf,
}

impl Dataplane {
    pub fn start() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("up-control-p{}-{number}", std::process::id());
        let socket = std::env::temp_dir().join(format!("{name}.sock"));
        let cgroup = cgroup2().join(&name);
        let child = command()
            .arg("--socket")
            .arg(&socket)
            .arg("--cgroup")
            .arg(&cgroup)
            .spawn()
            .expect("built by cargo");
        let mut it = Self {
            child,
            socket,
            cgroup,
        };
        eventually("the data plane answers", || {
            let ended = it.child.try_wait().expect("our child");
            assert!(ended.is_none(), "the data plane ended: {ended:?}");
            std::os::unix::net::UnixStream::connect(&it.socket).is_ok()
        });
        it
    }

    pub fn agent(&self, node: &str) -> Client {
        Client::agent(&self.socket, node)
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        let pid = Pid::from_raw(pid).expect("not 0");
        kill_process(pid, signal).expect("it runs");
    }

    pub fn wait(&mut self) -> ExitStatus {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status;
            }
            assert!(
                std::time::Instant::now() < end,
                "the data plane doesn't end"
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn open_files(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.child.id());
        std::fs::read_dir(folder).expect("it runs").count()
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underpass-dataplane"));
    for name in ["SOCKET", "CGROUP", "WORKERS"] {
        command.env_remove(format!("UNDERPASS_DATAPLANE_{name}"));
    }
    command
}

/// Wherever it is mounted here.
pub fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("proc is mounted");
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut all = mounts.lines().map(fields);
    let mount = all.find(|fields| fields.get(2).is_some_and(|kind| kind == "cgroup2"));
    PathBuf::from(&mount.expect("cgroup2 is mounted")[1])
}
