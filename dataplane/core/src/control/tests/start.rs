use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command};

use super::*;
use crate::control::cgroup;
use crate::control::socket::SocketError;

#[tokio::test]
async fn the_socket_is_private_and_a_live_one_is_left_alone() {
    let plane = Plane::start();
    let mode = std::fs::metadata(&plane.socket).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let error = ControlSocket::bind(&plane.socket).map(drop);
    let error = error.expect_err("in use");
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(matches!(error, SocketError::InUse(_, pid) if pid == own));
    plane.agent().await;
}

#[tokio::test]
async fn a_dead_data_planes_socket_is_replaced() {
    let path = temporary("sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let bound = ControlSocket::bind(&path).expect("nobody serves it");
    let file = bound.file();
    assert!(UnixStream::connect(&path).await.is_ok());
    file.remove();
    assert!(!path.exists());
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_left_alone() {
    let path = temporary("file");
    std::fs::write(&path, "precious").unwrap();
    let error = ControlSocket::bind(&path).map(drop);
    assert!(matches!(error, Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(&path).unwrap();
}

/// cgroup2 of this machine, wherever it is mounted.
fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|l| l.split(' ').nth(2) == Some("cgroup2"));
    let mount = line.expect("cgroup2 is mounted").split(' ').nth(1);
    mount.unwrap().into()
}

struct Occupant(Child);

impl Drop for Occupant {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Entering one would move this test's process with all its other tests, so only refusals.
#[test]
fn roots_ordinary_folders_and_occupied_cgroups_are_refused() {
    let text = |path: &std::path::Path| {
        let error = cgroup::enter(path).expect_err("refused");
        error.to_string()
    };
    assert!(text(&cgroup2()).contains("is the root"));
    let folder = temporary("folder");
    assert!(text(&folder).contains("not on a cgroup2"));
    assert!(!folder.exists());
    assert!(text("relative".as_ref()).contains("absolute"));

    let leaf = cgroup2().join(temporary("leaf").file_name().unwrap());
    std::fs::create_dir(&leaf).unwrap();
    let sleeper = Command::new("sleep").arg("600").spawn().unwrap();
    let sleeper = Occupant(sleeper);
    let pid = sleeper.0.id().to_string();
    std::fs::write(leaf.join("cgroup.procs"), &pid).unwrap();
    let occupied = text(&leaf);
    assert!(occupied.contains("other processes"), "{occupied}");
    assert!(occupied.contains(&pid), "{occupied}");
    drop(sleeper);
    std::fs::create_dir(leaf.join("child")).unwrap();
    assert!(text(&leaf).contains("name a leaf"));
    std::fs::remove_dir(leaf.join("child")).unwrap();
    std::fs::remove_dir(&leaf).unwrap();
}
