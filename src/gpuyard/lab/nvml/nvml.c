/* A libnvidia-ml.so.1 without a GPU: NVML's functions, answered from the state file of a lab's node.
 *
 * Its version is that of its own file's name, as packages name it; it works only with a loaded driver of that version. A
 * value that nobody pinned moves with the load of the engines that hold the GPU. docs/lab.md says what can be set. */
#define _GNU_SOURCE

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"
#include "state.h"

#define EXPORT __attribute__((visibility("default")))
#define GPUS 32

struct gpu {
    char uuid[96]; /* what the handle stands for, whatever number it has now */
    int device;    /* its device file, open while NVML is: that is what counts as a user of the module */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct gpu handles[GPUS];
static int users, control = -1;
static char own_version[80], loaded_version[80];

/* --- a question, from its beginning to its end ------------------------------------------------------------------ */

typedef struct {
    nvmlReturn_t code; /* not 0: the answer is this, whatever was asked */
    int gpu;           /* its number now */
} Call;

static void leave(Call *call)
{
    (void)call;
    pthread_mutex_unlock(&lock);
}

/* What the state wants this function to end with: a number, "hang", or NULL. Functions are named without the version at
 * their end, and `*` is every function that is about the GPU. */
static const char *injected(const char *function, int gpu)
{
    int length = strcspn(function, "_");
    const char *found = NULL;
    for (int any = gpu < 0 ? 0 : gpu; !found && any < (gpu < 0 ? GPUS : gpu + 1); any++)
        found = state_text("gpu.%d.nvml.%.*s", any, length, function);
    return found || gpu < 0 ? found : state_text("gpu.%d.nvml.*", gpu);
}

static int gpus(void)
{
    const char *text = state_text("gpus");
    int found = text ? atoi(text) : 0;
    return found > GPUS ? GPUS : found;
}

static int number_of(const char *key, const char *value)
{
    for (int gpu = 0; gpu < gpus(); gpu++) {
        const char *found = state_text("gpu.%d.%s", gpu, key);
        if (found && strcasecmp(found, value) == 0)
            return gpu;
    }
    return -1;
}

static bool flag(int gpu, const char *key)
{
    const char *text = state_text("gpu.%d.%s", gpu, key);
    return text && strcmp(text, "1") == 0;
}

/* What holds for a GPU before any question about it. A hanging function hangs for as long as the state says so. */
static nvmlReturn_t admitted(const char *function, int gpu)
{
    for (;;) {
        if (!state_refresh())
            return NVML_ERROR_UNKNOWN;
        const char *wanted = injected(function, gpu);
        if (!wanted)
            return gpu >= 0 && flag(gpu, "lost") ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
        if (strcmp(wanted, "hang") != 0)
            return atoi(wanted);
        pthread_mutex_unlock(&lock);
        usleep(100 * 1000);
        pthread_mutex_lock(&lock);
    }
}

static Call enter(const char *function, nvmlDevice_t device, bool about_a_gpu)
{
    Call call = {NVML_SUCCESS, -1};
    pthread_mutex_lock(&lock);
    if (!users)
        call.code = NVML_ERROR_UNINITIALIZED;
    else if (about_a_gpu && (device < handles || device >= handles + GPUS || !*device->uuid))
        call.code = NVML_ERROR_INVALID_ARGUMENT;
    else if (!state_refresh())
        call.code = NVML_ERROR_UNKNOWN;
    else if (about_a_gpu && (call.gpu = number_of("uuid", device->uuid)) < 0)
        call.code = NVML_ERROR_GPU_IS_LOST; /* pulled out since */
    else
        call.code = admitted(function, call.gpu);
    return call;
}

#define ENTER(device, about_a_gpu, valid) \
    __attribute__((cleanup(leave))) Call call = enter(__func__, device, about_a_gpu); \
    if (call.code) \
        return call.code; \
    if (!(valid)) \
        return NVML_ERROR_INVALID_ARGUMENT
#define ASKED(valid) ENTER(NULL, false, valid)
#define ASKED_OF(device, valid) ENTER(device, true, valid)
/* What is injected there is about the GPU that is found, so it counts when it is. */
#define ASKED_FOR_ONE(valid) \
    __attribute__((cleanup(leave))) Call call = enter("", NULL, false); \
    if (call.code) \
        return call.code; \
    if (!(valid)) \
        return NVML_ERROR_INVALID_ARGUMENT

/* --- values of one GPU ------------------------------------------------------------------------------------------- */

static bool pinned(int gpu, const char *key, double *into)
{
    const char *text = state_text("gpu.%d.%s", gpu, key);
    char *end;
    if (!text)
        return false;
    *into = strtod(text, &end);
    return end != text && !*end;
}

static double value(int gpu, const char *key, double otherwise)
{
    double found;
    return pinned(gpu, key, &found) ? found : otherwise;
}

static nvmlReturn_t put(int gpu, const char *key, unsigned int *into)
{
    double found;
    if (!pinned(gpu, key, &found))
        return NVML_ERROR_NOT_SUPPORTED;
    *into = found;
    return NVML_SUCCESS;
}

static nvmlReturn_t put_text(const char *text, char *into, unsigned int length)
{
    if (!text)
        return NVML_ERROR_NOT_SUPPORTED;
    if (strlen(text) >= length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(into, text);
    return NVML_SUCCESS;
}

/* An engine that holds a GPU, as its holder wrote it down: `start-time MiB load minor...` in a file named by its pid. */
typedef struct {
    unsigned int pid;
    double mib, load;
} Process;

static bool lives(unsigned int pid, u64 started)
{
    char path[64], stat[1024], *after;
    u64 since = 0;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return false;
    bool read = fgets(stat, sizeof stat, file) && (after = strrchr(stat, ')'));
    fclose(file);
    /* Its 22nd field; the second one, in brackets, may hold anything. */
    return read && sscanf(after + 2, "%*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu",
                          &since) == 1 && since == started;
}

static int processes(int gpu, Process *into, int room)
{
    char path[4096], line[512];
    int found = 0, minor = value(gpu, "minor", -1);
    DIR *folder = opendir(under_root(path, sizeof path, "run/gpuyard-lab/processes"));
    for (struct dirent *entry; folder && found < room && (entry = readdir(folder));) {
        Process process = {strtoul(entry->d_name, NULL, 10), 0, 0};
        u64 started;
        int at = 0;
        snprintf(line, sizeof line, "run/gpuyard-lab/processes/%.64s", entry->d_name);
        FILE *file = process.pid ? fopen(under_root(path, sizeof path, line), "re") : NULL;
        if (!file)
            continue;
        bool whole = fgets(line, sizeof line, file) &&
                     sscanf(line, "%llu %lf %lf%n", &started, &process.mib, &process.load, &at) == 3;
        fclose(file);
        if (!whole || !lives(process.pid, started))
            continue;
        for (char *rest = line + at, *word; (word = strsep(&rest, " \n"));)
            if (*word && atoi(word) == minor) {
                into[found++] = process;
                break;
            }
    }
    if (folder)
        closedir(folder);
    return found;
}

static double utilization(int gpu)
{
    Process held[64];
    double load = 0;
    if (pinned(gpu, "utilization_gpu", &load))
        return load;
    for (int n = processes(gpu, held, 64); n--;)
        load += held[n].load;
    return load > 100 ? 100 : load;
}

/* From `idle` to `busy` as the load goes from 0 to 100 %. */
static double between(int gpu, double idle, double busy)
{
    return idle + (busy - idle) * utilization(gpu) / 100;
}

static double temperature(int gpu)
{
    return value(gpu, "temperature_c",
                 (int)between(gpu, value(gpu, "temperature_idle_c", 30), value(gpu, "temperature_load_c", 65)));
}

/* From Ada on, thresholds are told as what is left to the highest temperature of normal work. */
static bool margins(int gpu, double *limit)
{
    return value(gpu, "architecture", 0) >= 8 && pinned(gpu, "temperature_max_c", limit);
}

static double power_draw(int gpu)
{
    double limit = value(gpu, "power_w", 0);
    return value(gpu, "power_draw_w", between(gpu, value(gpu, "power_idle_w", limit / 10), limit));
}

static double memory_used(int gpu)
{
    Process held[64];
    double mib = 0;
    if (pinned(gpu, "memory_used_mib", &mib))
        return mib;
    for (int n = processes(gpu, held, 64); n--;)
        mib += held[n].mib;
    return mib;
}

static const char *const CLOCK_NAMES[CLOCKS] = {"graphics", "sm", "memory", "video"};

static nvmlReturn_t clock_of(int gpu, const char *of, unsigned int clock, unsigned int *into)
{
    char key[64];
    if (clock >= CLOCKS)
        return NVML_ERROR_INVALID_ARGUMENT;
    snprintf(key, sizeof key, "%s.%s", of, CLOCK_NAMES[clock]);
    return put(gpu, key, into);
}

static nvmlReturn_t clock_now(int gpu, unsigned int clock, unsigned int *into)
{
    nvmlReturn_t code = clock_of(gpu, "clocks", clock, into);
    return code == NVML_ERROR_NOT_SUPPORTED
               ? clock_of(gpu, utilization(gpu) > 0 ? "clocks_max" : "clocks_idle", clock, into)
               : code;
}

static u64 event_reasons(int gpu)
{
    return value(gpu, "clocks_event_reasons", utilization(gpu) > 0 ? 0 : 1);
}

static bool ecc_counts(int gpu)
{
    return flag(gpu, "ecc.enabled");
}

static double errors(int gpu, unsigned int kind, unsigned int counter, const char *where)
{
    char key[64];
    snprintf(key, sizeof key, "ecc.%s.%s.%s", kind == ERRORS_CORRECTED ? "corrected" : "uncorrected",
             counter == COUNTER_VOLATILE ? "volatile" : "aggregate", where);
    return value(gpu, key, 0);
}

static bool persistent(void)
{
    char path[4096];
    int pid = 0;
    FILE *file = fopen(under_root(path, sizeof path, "run/nvidia-persistenced/nvidia-persistenced.pid"), "re");
    bool read = file && fscanf(file, "%d", &pid) == 1;
    if (file)
        fclose(file);
    return read && pid > 0 && (kill(pid, 0) == 0 || errno == EPERM);
}

static int links(int gpu)
{
    int found = 0;
    while (state_text("gpu.%d.nvlink.%d.state", gpu, found))
        found++;
    return found;
}

static bool link_active(int gpu, unsigned int link)
{
    const char *state = state_text("gpu.%d.nvlink.%u.state", gpu, link);
    return state && strcmp(state, "active") == 0;
}

static double link_value(int gpu, unsigned int link, const char *key)
{
    const char *text = state_text("gpu.%d.nvlink.%u.%s", gpu, link, key);
    return text ? strtod(text, NULL) : 0;
}

static void pci(int gpu, nvmlPciInfo_t *into)
{
    const char *bdf = state_text("gpu.%d.bdf", gpu), *device = state_text("gpu.%d.device", gpu);
    const char *subsystem = state_text("gpu.%d.subsystem", gpu);
    memset(into, 0, sizeof *into);
    sscanf(bdf ? bdf : "", "%x:%x:%x", &into->domain, &into->bus, &into->device);
    into->pciDeviceId = strtoul(device ? device : "0", NULL, 16) << 16 | 0x10de;
    into->pciSubSystemId = subsystem ? strtoul(subsystem, NULL, 16) : 0;
    snprintf(into->busIdLegacy, sizeof into->busIdLegacy, "%04X:%02X:%02X.0", into->domain & 0xffff, into->bus & 0xff,
             into->device & 0x1f);
    snprintf(into->busId, sizeof into->busId, "%08X:%02X:%02X.0", into->domain, into->bus & 0xff, into->device & 0x1f);
}

/* --- beginning and end ------------------------------------------------------------------------------------------- */

__attribute__((constructor)) static void read_own_version(void)
{
    Dl_info self;
    char path[4096];
    if (dladdr(read_own_version, &self) && realpath(self.dli_fname, path)) {
        char *version = strstr(path, ".so.");
        snprintf(own_version, sizeof own_version, "%.79s", version ? version + 4 : "");
    }
}

static bool read_loaded_version(void)
{
    char path[4096], line[512] = "";
    FILE *file = fopen(under_root(path, sizeof path, "proc/driver/nvidia/version"), "re");
    bool read = file && fgets(line, sizeof line, file);
    if (file)
        fclose(file);
    char *words = read ? strstr(line, "Kernel Module") : NULL;
    words = words ? strstr(words, "  ") : NULL;
    return words && sscanf(words, " %79[0-9.]", loaded_version) == 1;
}

static nvmlReturn_t begin(void)
{
    char path[4096];
    if (users)
        return NVML_SUCCESS;
    if (!read_loaded_version())
        return NVML_ERROR_DRIVER_NOT_LOADED;
    if (strcmp(loaded_version, own_version) != 0)
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    /* EPERM is a control group that forbids the device, which real NVML knows no better word for. */
    control = open(under_root(path, sizeof path, "dev/nvidiactl"), O_RDWR | O_CLOEXEC);
    if (control < 0)
        return errno == EACCES ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_UNKNOWN;
    nvmlReturn_t code = admitted("nvmlInit", -1);
    if (code) {
        close(control);
        control = -1;
    }
    return code;
}

EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    nvmlReturn_t code = begin();
    users += code == NVML_SUCCESS;
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
EXPORT nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

EXPORT nvmlReturn_t nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t code = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users && !--users) {
        close(control);
        for (struct gpu *gpu = handles; gpu < handles + GPUS; gpu++) {
            if (*gpu->uuid)
                close(gpu->device);
            *gpu->uuid = 0;
        }
    }
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT const char *nvmlErrorString(nvmlReturn_t code)
{
    static const char *const WORDS[] = {
        "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions",
        "Already Initialized", "Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded",
        "Timeout", "Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found",
        "Corrupted infoROM", "GPU is lost", "GPU requires reset", "The operating system has blocked the request",
        "Driver/library version mismatch", "In use by another client", "Insufficient Memory", "No data",
        "The requested vgpu operation is not available on target device, because ECC is enabled",
        "Insufficient Resources", "Frequency Not Supported", "Argument version mismatch", "Deprecated", "Not Ready",
        "No GPUs were found", "Invalid State", "Reset type not supported",
    };
    return code >= 0 && code < (int)(sizeof WORDS / sizeof *WORDS) ? WORDS[code] : "Unknown Error";
}

/* --- the system -------------------------------------------------------------------------------------------------- */

EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    ASKED(version);
    return put_text(loaded_version, version, length);
}

EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned int length)
{
    /* Answers before NVML is initialized too: whoever meets a mismatch asks this next. NVML's own version is the CUDA
     * release's first number before the driver's. */
    char text[96];
    snprintf(text, sizeof text, "13.%s", own_version);
    return version ? put_text(text, version, length) : NVML_ERROR_INVALID_ARGUMENT;
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    /* The CUDA release of each driver branch that the lab has packages of; NVIDIA, CUDA Toolkit release notes. */
    ASKED(version);
    *version = strtol(own_version, NULL, 10) >= 590 ? 13010 : 13000;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

EXPORT nvmlReturn_t nvmlSystemGetProcessName(unsigned int pid, char *name, unsigned int length)
{
    char path[64], words[4096] = "";
    ASKED(name && length);
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return NVML_ERROR_NOT_FOUND;
    size_t read = fread(words, 1, sizeof words - 1, file);
    fclose(file);
    if (!read)
        return NVML_ERROR_NOT_FOUND;
    snprintf(name, length, "%s", words);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlUnitGetCount(unsigned int *number)
{
    ASKED(number);
    *number = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlGetExcludedDeviceCount(unsigned int *number)
{
    ASKED(number);
    *number = 0;
    return NVML_SUCCESS;
}

/* --- finding a GPU ----------------------------------------------------------------------------------------------- */

EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *number)
{
    ASKED(number);
    *number = gpus();
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCount(unsigned int *number) { return nvmlDeviceGetCount_v2(number); }

static nvmlReturn_t handle(const char *function, int gpu, nvmlDevice_t *into)
{
    char path[4096], name[32];
    const char *uuid = state_text("gpu.%d.uuid", gpu);
    struct gpu *free = NULL, *found = NULL;
    nvmlReturn_t code = admitted(function, gpu);
    if (code)
        return code;
    for (struct gpu *one = handles; one < handles + GPUS; one++) {
        if (!*one->uuid && !free)
            free = one;
        if (uuid && strcmp(one->uuid, uuid) == 0)
            found = one;
    }
    if (!found) {
        snprintf(name, sizeof name, "dev/nvidia%d", (int)value(gpu, "minor", -1));
        int device = open(under_root(path, sizeof path, name), O_RDWR | O_CLOEXEC);
        if (device < 0 || !uuid || !free)
            return device < 0 && errno == EACCES ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_UNKNOWN;
        found = free;
        found->device = device;
        snprintf(found->uuid, sizeof found->uuid, "%s", uuid);
    }
    *into = found;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    ASKED_FOR_ONE(device && (int)index < gpus());
    return handle(__func__, index, device);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned int index, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    ASKED_FOR_ONE(uuid && device);
    int gpu = number_of("uuid", uuid);
    return gpu < 0 ? NVML_ERROR_NOT_FOUND : handle(__func__, gpu, device);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device)
{
    ASKED_FOR_ONE(serial && device);
    int gpu = number_of("serial", serial);
    return gpu < 0 ? NVML_ERROR_NOT_FOUND : handle(__func__, gpu, device);
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *address, nvmlDevice_t *device)
{
    unsigned int asked[3] = {0}, found[3];
    ASKED_FOR_ONE(address && device);
    /* With or without a domain, of whatever length. */
    if (sscanf(address, "%x:%x:%x.", &asked[0], &asked[1], &asked[2]) != 3 &&
        (asked[0] = 0, sscanf(address, "%x:%x.", &asked[1], &asked[2]) != 2))
        return NVML_ERROR_INVALID_ARGUMENT;
    for (int gpu = 0; gpu < gpus(); gpu++) {
        const char *bdf = state_text("gpu.%d.bdf", gpu);
        if (bdf && sscanf(bdf, "%x:%x:%x.", &found[0], &found[1], &found[2]) == 3 &&
            memcmp(asked, found, sizeof asked) == 0)
            return handle(__func__, gpu, device);
    }
    return NVML_ERROR_NOT_FOUND;
}

EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *address, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByPciBusId_v2(address, device);
}

/* --- what a GPU is ----------------------------------------------------------------------------------------------- */

#define TEXT(function, key) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, char *text, unsigned int length) \
    { \
        ASKED_OF(device, text); \
        return put_text(state_text("gpu.%d." key, call.gpu), text, length); \
    }
TEXT(nvmlDeviceGetName, "name")
TEXT(nvmlDeviceGetUUID, "uuid")
TEXT(nvmlDeviceGetSerial, "serial")
TEXT(nvmlDeviceGetVbiosVersion, "vbios")
TEXT(nvmlDeviceGetBoardPartNumber, "part_number")

#define NUMBER(function, key) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int *number) \
    { \
        ASKED_OF(device, number); \
        return put(call.gpu, key, number); \
    }
NUMBER(nvmlDeviceGetArchitecture, "architecture")
NUMBER(nvmlDeviceGetBrand, "brand")
NUMBER(nvmlDeviceGetMinorNumber, "minor")
NUMBER(nvmlDeviceGetModuleId, "minor")
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, "pcie_max.gen")
NUMBER(nvmlDeviceGetGpuMaxPcieLinkGeneration, "pcie_max.gen")
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, "pcie_max.width")
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, "pcie.width")
NUMBER(nvmlDeviceGetPcieReplayCounter, "pcie.replays")

/* What is the same for every GPU of the lab. */
#define FIXED(function, fixed) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int *number) \
    { \
        ASKED_OF(device, number); \
        *number = fixed; \
        return NVML_SUCCESS; \
    }
FIXED(nvmlDeviceGetIndex, call.gpu)
FIXED(nvmlDeviceGetPersistenceMode, persistent())
FIXED(nvmlDeviceGetComputeMode, 0)
FIXED(nvmlDeviceGetDisplayMode, 1) /* what boards without a display say */
FIXED(nvmlDeviceGetAccountingBufferSize, 4000)
FIXED(nvmlDeviceGetDisplayActive, 0)
FIXED(nvmlDeviceGetMultiGpuBoard, 0)
FIXED(nvmlDeviceGetAccountingMode, 0)
FIXED(nvmlDeviceGetPowerManagementMode, 1)
FIXED(nvmlDeviceGetNumFans, 0)
FIXED(nvmlDeviceGetMaxMigDeviceCount, flag(call.gpu, "mig_capable") ? 7 : 0)

static unsigned int performance(int gpu)
{
    return utilization(gpu) > 0 ? 0 : value(gpu, "pstate_idle", 0);
}
/* A link is as slow as can be while its board sleeps, and nothing is wrong with it. */
FIXED(nvmlDeviceGetCurrPcieLinkGeneration,
      value(call.gpu, "pcie.gen", performance(call.gpu) ? 1 : value(call.gpu, "pcie_max.gen", 1)))
FIXED(nvmlDeviceGetPerformanceState, performance(call.gpu))
FIXED(nvmlDeviceGetPowerState, performance(call.gpu))

EXPORT nvmlReturn_t nvmlDeviceGetBoardId(nvmlDevice_t device, unsigned int *number)
{
    nvmlPciInfo_t where;
    ASKED_OF(device, number);
    pci(call.gpu, &where);
    *number = where.domain << 16 | where.bus << 8;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *info)
{
    ASKED_OF(device, info);
    pci(call.gpu, info);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_t *info)
{
    return nvmlDeviceGetPciInfo_v3(device, info);
}

EXPORT nvmlReturn_t nvmlDeviceGetPciInfoExt(nvmlDevice_t device, nvmlPciInfoExt_t *info)
{
    nvmlPciInfo_t where;
    ASKED_OF(device, info);
    if (info->version != VERSION(nvmlPciInfoExt_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    pci(call.gpu, &where);
    *info = (nvmlPciInfoExt_t){info->version, where.domain, where.bus, where.device, where.pciDeviceId,
                               where.pciSubSystemId, 0x03, 0x02, ""};
    strcpy(info->busId, where.busId);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    ASKED_OF(device, major && minor);
    const char *text = state_text("gpu.%d.compute", call.gpu);
    return text && sscanf(text, "%d.%d", major, minor) == 2 ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

EXPORT nvmlReturn_t nvmlDeviceGetGspFirmwareVersion(nvmlDevice_t device, char *version)
{
    ASKED_OF(device, version);
    strcpy(version, loaded_version);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetGspFirmwareMode(nvmlDevice_t device, unsigned int *enabled, unsigned int *standard)
{
    ASKED_OF(device, enabled && standard);
    *enabled = *standard = 1;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetVirtualizationMode(nvmlDevice_t device, unsigned int *mode)
{
    ASKED_OF(device, mode);
    *mode = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    ASKED_OF(device, current && pending);
    *current = *pending = 0;
    return flag(call.gpu, "mig_capable") ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

EXPORT nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned int *is)
{
    ASKED_OF(device, is);
    *is = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned int *level)
{
    ASKED_OF(one, other && level);
    *level = TOPOLOGY_SYSTEM;
    return NVML_SUCCESS;
}

/* --- how it is --------------------------------------------------------------------------------------------------- */

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ASKED_OF(device, memory);
    u64 total = (u64)value(call.gpu, "memory_mib", 0) << 20, used = (u64)memory_used(call.gpu) << 20;
    *memory = (nvmlMemory_t){total, total - used, used};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    ASKED_OF(device, memory);
    if (memory->version != VERSION(nvmlMemory_v2_t, 2))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    u64 total = (u64)value(call.gpu, "memory_mib", 0) << 20, used = (u64)memory_used(call.gpu) << 20;
    *memory = (nvmlMemory_v2_t){memory->version, total, 0, total - used, used};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, nvmlBAR1Memory_t *memory)
{
    double mib;
    ASKED_OF(device, memory);
    if (!pinned(call.gpu, "bar1_mib", &mib))
        return NVML_ERROR_NOT_SUPPORTED;
    u64 total = (u64)mib << 20, used = 1 << 20;
    *memory = (nvmlBAR1Memory_t){total, total - used, used};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates)
{
    ASKED_OF(device, rates);
    rates->gpu = utilization(call.gpu);
    rates->memory = value(call.gpu, "utilization_memory", utilization(call.gpu) / 2);
    return NVML_SUCCESS;
}

#define IDLE_ENGINE(function) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int *percent, unsigned int *period) \
    { \
        ASKED_OF(device, percent && period); \
        *percent = 0; \
        *period = 167000; \
        return NVML_SUCCESS; \
    }
IDLE_ENGINE(nvmlDeviceGetEncoderUtilization)
IDLE_ENGINE(nvmlDeviceGetDecoderUtilization)
IDLE_ENGINE(nvmlDeviceGetJpgUtilization)
IDLE_ENGINE(nvmlDeviceGetOfaUtilization)

EXPORT nvmlReturn_t nvmlDeviceGetEncoderStats(nvmlDevice_t device, unsigned int *sessions, unsigned int *frames,
                                              unsigned int *latency)
{
    ASKED_OF(device, sessions && frames && latency);
    *sessions = *frames = *latency = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetFBCStats(nvmlDevice_t device, unsigned int stats[3])
{
    ASKED_OF(device, stats);
    stats[0] = stats[1] = stats[2] = 0;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetConfComputeProtectedMemoryUsage(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ASKED_OF(device, memory);
    *memory = (nvmlMemory_t){0, 0, 0};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned int sensor, unsigned int *celsius)
{
    ASKED_OF(device, celsius && sensor == 0);
    *celsius = temperature(call.gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *asked)
{
    ASKED_OF(device, asked);
    if (asked->version != VERSION(nvmlTemperature_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (asked->sensorType != 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    asked->temperature = temperature(call.gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t device, nvmlMarginTemperature_t *asked)
{
    double limit;
    ASKED_OF(device, asked);
    if (asked->version != VERSION(nvmlMarginTemperature_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!margins(call.gpu, &limit))
        return NVML_ERROR_NOT_SUPPORTED;
    asked->marginTemperature = limit - temperature(call.gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, unsigned int which, unsigned int *celsius)
{
    static const char *const KEYS[] = {"temperature_shutdown_c", "temperature_slowdown_c", "temperature_memory_max_c",
                                       "temperature_max_c"};
    ASKED_OF(device, celsius);
    return which < sizeof KEYS / sizeof *KEYS ? put(call.gpu, KEYS[which], celsius) : NVML_ERROR_NOT_SUPPORTED;
}

#define MILLIWATTS(function, watts) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int *milliwatts) \
    { \
        ASKED_OF(device, milliwatts); \
        *milliwatts = 1000 * (watts) + 0.5; \
        return NVML_SUCCESS; \
    }
MILLIWATTS(nvmlDeviceGetPowerUsage, power_draw(call.gpu))
MILLIWATTS(nvmlDeviceGetPowerManagementLimit, value(call.gpu, "power_w", 0))
MILLIWATTS(nvmlDeviceGetEnforcedPowerLimit, value(call.gpu, "power_w", 0))
MILLIWATTS(nvmlDeviceGetPowerManagementDefaultLimit, value(call.gpu, "power_max_w", value(call.gpu, "power_w", 0)))

EXPORT nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned int *least,
                                                                 unsigned int *most)
{
    ASKED_OF(device, least && most);
    double limit = value(call.gpu, "power_w", 0);
    *least = 1000 * value(call.gpu, "power_min_w", limit);
    *most = 1000 * value(call.gpu, "power_max_w", limit);
    return NVML_SUCCESS;
}

static u64 energy_mj(int gpu)
{
    /* Since the machine's start, at what it draws now: a counter that only grows while nothing is patched. */
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return power_draw(gpu) * 1000 * (now.tv_sec + now.tv_nsec / 1e9);
}

EXPORT nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, u64 *millijoules)
{
    ASKED_OF(device, millijoules);
    *millijoules = energy_mj(call.gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned int clock, unsigned int *mhz)
{
    ASKED_OF(device, mhz);
    return clock_now(call.gpu, clock, mhz);
}

EXPORT nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned int clock, unsigned int *mhz)
{
    ASKED_OF(device, mhz);
    return clock_of(call.gpu, "clocks_max", clock, mhz);
}

EXPORT nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, unsigned int clock, unsigned int kind, unsigned int *mhz)
{
    ASKED_OF(device, mhz);
    return kind == 0 ? clock_now(call.gpu, clock, mhz) : clock_of(call.gpu, "clocks_max", clock, mhz);
}

#define AT_FULL_SPEED(function) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int clock, unsigned int *mhz) \
    { \
        ASKED_OF(device, mhz); \
        return clock == CLOCK_VIDEO ? NVML_ERROR_NOT_SUPPORTED : clock_of(call.gpu, "clocks_max", clock, mhz); \
    }
AT_FULL_SPEED(nvmlDeviceGetApplicationsClock)
AT_FULL_SPEED(nvmlDeviceGetDefaultApplicationsClock)

EXPORT nvmlReturn_t nvmlDeviceGetSupportedMemoryClocks(nvmlDevice_t device, unsigned int *number, unsigned int *mhz)
{
    unsigned int fastest;
    ASKED_OF(device, number);
    nvmlReturn_t code = clock_of(call.gpu, "clocks_max", CLOCK_MEMORY, &fastest);
    if (code)
        return code;
    unsigned int room = *number;
    *number = 1;
    if (!room || !mhz)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    *mhz = fastest;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, u64 *reasons)
{
    ASKED_OF(device, reasons);
    *reasons = event_reasons(call.gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, u64 *reasons)
{
    ASKED_OF(device, reasons);
    *reasons = event_reasons(call.gpu);
    return NVML_SUCCESS;
}

static nvmlReturn_t all_reasons(u64 *reasons)
{
    *reasons = 0x1ff;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, u64 *reasons)
{
    ASKED_OF(device, reasons);
    return all_reasons(reasons);
}

EXPORT nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, u64 *reasons)
{
    ASKED_OF(device, reasons);
    return all_reasons(reasons);
}

EXPORT nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t device, unsigned int policy, nvmlViolationTime_t *time)
{
    struct timespec now;
    ASKED_OF(device, time && policy < 16);
    clock_gettime(CLOCK_REALTIME, &now);
    *time = (nvmlViolationTime_t){now.tv_sec * 1000000ull + now.tv_nsec / 1000, 0};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, unsigned int counter, unsigned int *kib)
{
    ASKED_OF(device, kib && counter < 2);
    *kib = 0;
    return NVML_SUCCESS;
}

/* --- errors of memory -------------------------------------------------------------------------------------------- */

EXPORT nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    ASKED_OF(device, current && pending);
    *current = *pending = ecc_counts(call.gpu);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetDefaultEccMode(nvmlDevice_t device, unsigned int *mode)
{
    ASKED_OF(device, mode);
    *mode = 1;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned int kind, unsigned int counter, u64 *found)
{
    ASKED_OF(device, found && kind < 2 && counter < 2);
    if (!ecc_counts(call.gpu))
        return NVML_ERROR_NOT_SUPPORTED;
    *found = errors(call.gpu, kind, counter, "sram") + errors(call.gpu, kind, counter, "dram");
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, unsigned int kind, unsigned int counter,
                                                    unsigned int where, u64 *found)
{
    ASKED_OF(device, found && kind < 2 && counter < 2);
    if (!ecc_counts(call.gpu) || (where != MEMORY_DRAM && where != MEMORY_SRAM))
        return NVML_ERROR_NOT_SUPPORTED;
    *found = errors(call.gpu, kind, counter, where == MEMORY_DRAM ? "dram" : "sram");
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetDetailedEccErrors(nvmlDevice_t device, unsigned int kind, unsigned int counter,
                                                   nvmlEccErrorCounts_t *found)
{
    ASKED_OF(device, found && kind < 2 && counter < 2);
    if (!ecc_counts(call.gpu))
        return NVML_ERROR_NOT_SUPPORTED;
    *found = (nvmlEccErrorCounts_t){
        .l2Cache = errors(call.gpu, kind, counter, "sram"),
        .deviceMemory = errors(call.gpu, kind, counter, "dram"),
    };
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetSramEccErrorStatus(nvmlDevice_t device, nvmlEccSramErrorStatus_t *status)
{
    ASKED_OF(device, status);
    if (status->version != VERSION(nvmlEccSramErrorStatus_t, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!ecc_counts(call.gpu))
        return NVML_ERROR_NOT_SUPPORTED;
    *status = (nvmlEccSramErrorStatus_t){
        .version = status->version,
        .aggregateUncSecDed = errors(call.gpu, ERRORS_UNCORRECTED, COUNTER_AGGREGATE, "sram"),
        .aggregateCor = errors(call.gpu, ERRORS_CORRECTED, COUNTER_AGGREGATE, "sram"),
        .volatileUncSecDed = errors(call.gpu, ERRORS_UNCORRECTED, COUNTER_VOLATILE, "sram"),
        .volatileCor = errors(call.gpu, ERRORS_CORRECTED, COUNTER_VOLATILE, "sram"),
        .aggregateUncBucketL2 = errors(call.gpu, ERRORS_UNCORRECTED, COUNTER_AGGREGATE, "sram"),
        .bThresholdExceeded = flag(call.gpu, "ecc.sram_threshold_exceeded"),
    };
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned int *correctable,
                                              unsigned int *uncorrectable, unsigned int *pending, unsigned int *failed)
{
    ASKED_OF(device, correctable && uncorrectable && pending && failed);
    if (!flag(call.gpu, "row_remapper"))
        return NVML_ERROR_NOT_SUPPORTED;
    *correctable = value(call.gpu, "remapped_rows.correctable", 0);
    *uncorrectable = value(call.gpu, "remapped_rows.uncorrectable", 0);
    *pending = flag(call.gpu, "remapped_rows.pending");
    *failed = flag(call.gpu, "remapped_rows.failure");
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetRowRemapperHistogram(nvmlDevice_t device, nvmlRowRemapperHistogramValues_t *banks)
{
    double all;
    ASKED_OF(device, banks);
    if (!flag(call.gpu, "row_remapper") || !pinned(call.gpu, "banks", &all))
        return NVML_ERROR_NOT_SUPPORTED;
    /* Each uncorrectable row has spent one spare of another bank; a failure means that one bank has none left. */
    unsigned int spent = value(call.gpu, "remapped_rows.uncorrectable", 0), none = flag(call.gpu, "remapped_rows.failure");
    *banks = (nvmlRowRemapperHistogramValues_t){all - spent - none, spent, 0, 0, none};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetRetiredPages_v2(nvmlDevice_t device, unsigned int cause, unsigned int *number,
                                                 u64 *addresses, u64 *times)
{
    ASKED_OF(device, number && cause < 2);
    if (flag(call.gpu, "row_remapper"))
        return NVML_ERROR_NOT_SUPPORTED;
    unsigned int room = *number;
    *number = value(call.gpu, cause ? "retired_pages.double_bit" : "retired_pages.single_bit", 0);
    if (room < *number)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int page = 0; addresses && page < *number; page++) {
        addresses[page] = 0x100000ull * (2 * page + cause + 1);
        if (times)
            times[page] = 0;
    }
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetRetiredPages(nvmlDevice_t device, unsigned int cause, unsigned int *number,
                                              u64 *addresses)
{
    return nvmlDeviceGetRetiredPages_v2(device, cause, number, addresses, NULL);
}

EXPORT nvmlReturn_t nvmlDeviceGetRetiredPagesPendingStatus(nvmlDevice_t device, unsigned int *pending)
{
    ASKED_OF(device, pending);
    if (flag(call.gpu, "row_remapper"))
        return NVML_ERROR_NOT_SUPPORTED;
    *pending = flag(call.gpu, "retired_pages.pending");
    return NVML_SUCCESS;
}

/* --- NVLink and the fabric --------------------------------------------------------------------------------------- */

#define LINK(function, type, answer) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int link, type *out) \
    { \
        ASKED_OF(device, out); \
        if (!links(call.gpu)) \
            return NVML_ERROR_NOT_SUPPORTED; \
        if ((int)link >= links(call.gpu)) \
            return NVML_ERROR_INVALID_ARGUMENT; \
        answer; \
        return NVML_SUCCESS; \
    }
LINK(nvmlDeviceGetNvLinkState, unsigned int, *out = link_active(call.gpu, link))
LINK(nvmlDeviceGetNvLinkVersion, unsigned int, *out = value(call.gpu, "nvlink_version", 0))
LINK(nvmlDeviceGetNvLinkRemoteDeviceType, unsigned int, *out = 2 /* a switch */)
LINK(nvmlDeviceGetNvLinkRemotePciInfo_v2, nvmlPciInfo_t, {
    memset(out, 0, sizeof *out);
    unsigned int count = strtoul(state_text("switches"), NULL, 10);
    out->bus = 5 + link % (count ? count : 1);
    snprintf(out->busIdLegacy, sizeof out->busIdLegacy, "0000:%02X:00.0", out->bus & 0xff);
    snprintf(out->busId, sizeof out->busId, "00000000:%02X:00.0", out->bus & 0xff);
})

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkCapability(nvmlDevice_t device, unsigned int link, unsigned int capability,
                                                  unsigned int *has)
{
    ASKED_OF(device, has && capability < 6);
    if ((int)link >= links(call.gpu))
        return links(call.gpu) ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NOT_SUPPORTED;
    *has = capability != 4; /* all but SLI bridges */
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t device, unsigned int link, unsigned int counter,
                                                    u64 *found)
{
    static const char *const KEYS[] = {"replays", "recoveries", "crc_errors"};
    ASKED_OF(device, found && counter < 5);
    if ((int)link >= links(call.gpu))
        return links(call.gpu) ? NVML_ERROR_INVALID_ARGUMENT : NVML_ERROR_NOT_SUPPORTED;
    *found = counter < 3 ? link_value(call.gpu, link, KEYS[counter]) : 0;
    return NVML_SUCCESS;
}

typedef struct {
    nvmlReturn_t status;
    unsigned char state;
    unsigned int health;
} Fabric;

/* A fabric manager leaves a mark where it configured the switches; that lasts until the driver is loaded anew. */
static bool fabric(int gpu, Fabric *into)
{
    char path[4096];
    if (!links(gpu) || value(gpu, "architecture", 0) < 9)
        return false;
    bool configured = access(under_root(path, sizeof path, "run/gpuyard-lab/fabric"), F_OK) == 0;
    into->state = value(gpu, "fabric.state", configured ? FABRIC_COMPLETED : FABRIC_IN_PROGRESS);
    into->status = value(gpu, "fabric.status", NVML_SUCCESS);
    into->health = value(gpu, "fabric.health", 0x2a | 0x80 | 0x100); /* each of its parts says: nothing is wrong */
    return true;
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, nvmlGpuFabricInfo_t *info)
{
    Fabric now;
    ASKED_OF(device, info);
    if (!fabric(call.gpu, &now))
        return NVML_ERROR_NOT_SUPPORTED;
    *info = (nvmlGpuFabricInfo_t){.status = now.status, .state = now.state};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, nvmlGpuFabricInfo_v3_t *info)
{
    Fabric now;
    ASKED_OF(device, info);
    if (info->version != VERSION(nvmlGpuFabricInfo_v2_t, 2) && info->version != VERSION(nvmlGpuFabricInfo_v3_t, 3))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (!fabric(call.gpu, &now))
        return NVML_ERROR_NOT_SUPPORTED;
    nvmlGpuFabricInfo_v3_t all = {.version = info->version, .status = now.status, .state = now.state,
                                  .healthMask = now.health, .healthSummary = now.health == 0x1aa ? 1 : 2};
    /* The second version is the beginning of the third. */
    memcpy(info, &all, info->version & 0xffffff);
    return NVML_SUCCESS;
}

/* --- processes --------------------------------------------------------------------------------------------------- */

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *number,
                                                            nvmlProcessInfo_t *infos)
{
    Process held[64];
    ASKED_OF(device, number);
    unsigned int room = *number, found = *number = processes(call.gpu, held, 64);
    if (found > room || (found && !infos))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int n = 0; n < found; n++)
        infos[n] = (nvmlProcessInfo_t){held[n].pid, (u64)held[n].mib << 20, ~0u, ~0u};
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned int *number,
                                                            nvmlProcessInfo_t *infos)
{
    return nvmlDeviceGetComputeRunningProcesses_v3(device, number, infos);
}

EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t device, unsigned int *number,
                                                         nvmlProcessInfo_v1_t *infos)
{
    Process held[64];
    ASKED_OF(device, number);
    unsigned int room = *number, found = *number = processes(call.gpu, held, 64);
    if (found > room || (found && !infos))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int n = 0; n < found; n++)
        infos[n] = (nvmlProcessInfo_v1_t){held[n].pid, (u64)held[n].mib << 20};
    return NVML_SUCCESS;
}

#define NO_PROCESSES(function) \
    EXPORT nvmlReturn_t function(nvmlDevice_t device, unsigned int *number, void *infos) \
    { \
        (void)infos; \
        ASKED_OF(device, number); \
        *number = 0; \
        return NVML_SUCCESS; \
    }
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3)

/* --- field values ------------------------------------------------------------------------------------------------ */

static nvmlReturn_t link_field(int gpu, unsigned int field, unsigned int link, nvmlFieldValue_t *into)
{
    static const char *const KEYS[] = {"replays", "recoveries", "crc_errors"};
    if (!links(gpu))
        return NVML_ERROR_NOT_SUPPORTED;
    if ((int)link >= links(gpu))
        return NVML_ERROR_INVALID_ARGUMENT;
    into->valueType = VALUE_UINT;
    if (field == 164)
        into->value.u = link_active(gpu, link) ? value(gpu, "nvlink_mbps", 0) : 0;
    else if (field == 165)
        into->value.u = link_active(gpu, link);
    else if (field == 166)
        into->value.u = value(gpu, "nvlink_version", 0);
    else
        into->value.u = link_value(gpu, link, KEYS[field - 161]);
    return NVML_SUCCESS;
}

static u64 links_together(int gpu, const char *key)
{
    u64 sum = 0;
    for (int link = links(gpu); link--;)
        sum += link_value(gpu, link, key);
    return sum;
}

/* Numbers as NVML_FI_DEV_* of nvml.h has them. */
static nvmlReturn_t field(int gpu, nvmlFieldValue_t *into)
{
    bool remaps = flag(gpu, "row_remapper"), linked = links(gpu) > 0;
    double found = 0;
    /* Power of the whole module or of its memory: of the boards here none tells it. */
    if (into->fieldId >= 185 && into->fieldId <= 192 && into->scopeId != 0)
        return NVML_ERROR_NOT_SUPPORTED;
    into->valueType = VALUE_U64;
    switch (into->fieldId) {
    case 1: /* ECC mode, now and pending */
    case 2:
        found = ecc_counts(gpu);
        break;
    case 3: /* ECC totals: corrected and uncorrected, volatile and then aggregate */
    case 4:
    case 5:
    case 6:
        if (!ecc_counts(gpu))
            return NVML_ERROR_NOT_SUPPORTED;
        found = errors(gpu, (into->fieldId - 3) % 2, (into->fieldId - 3) / 2, "sram") +
                errors(gpu, (into->fieldId - 3) % 2, (into->fieldId - 3) / 2, "dram");
        break;
    case 11: /* ECC of device memory */
    case 12:
    case 22:
    case 23:
        if (!ecc_counts(gpu))
            return NVML_ERROR_NOT_SUPPORTED;
        found = errors(gpu, into->fieldId == 12 || into->fieldId == 23, into->fieldId > 20, "dram");
        break;
    case 29: /* retired pages */
    case 30:
    case 31:
        if (remaps)
            return NVML_ERROR_NOT_SUPPORTED;
        found = value(gpu,
                      into->fieldId == 29   ? "retired_pages.single_bit"
                      : into->fieldId == 30 ? "retired_pages.double_bit"
                                            : "retired_pages.pending",
                      0);
        break;
    case 38: /* NVLink totals: CRC of flits, of data, replays, recoveries */
    case 45:
    case 52:
    case 59:
        if (!linked)
            return NVML_ERROR_NOT_SUPPORTED;
        found = into->fieldId == 38   ? links_together(gpu, "crc_errors")
                : into->fieldId == 52 ? links_together(gpu, "replays")
                : into->fieldId == 59 ? links_together(gpu, "recoveries")
                                      : 0;
        break;
    case 82: /* temperature of the memory */
        if (!pinned(gpu, "temperature_memory_c", &found)) {
            if (!state_text("gpu.%d.temperature_memory_max_c", gpu))
                return NVML_ERROR_NOT_SUPPORTED;
            found = temperature(gpu) + 8;
        }
        into->valueType = VALUE_UINT;
        break;
    case 83: /* energy */
    case 191:
        found = energy_mj(gpu);
        break;
    case 90: /* speed that all links have in common */
        if (!linked)
            return NVML_ERROR_NOT_SUPPORTED;
        found = value(gpu, "nvlink_mbps", 0);
        break;
    case 91: /* links, and those to a switch */
    case 147:
        into->valueType = VALUE_UINT;
        found = links(gpu);
        break;
    case 94:
        into->valueType = VALUE_UINT;
        found = value(gpu, "pcie.replays", 0);
        break;
    case 142: /* remapped rows: correctable, uncorrectable, pending, failed */
    case 143:
    case 144:
    case 145: {
        static const char *const KEYS[] = {"correctable", "uncorrectable", "pending", "failure"};
        char key[64];
        if (!remaps)
            return NVML_ERROR_NOT_SUPPORTED;
        snprintf(key, sizeof key, "remapped_rows.%s", KEYS[into->fieldId - 142]);
        into->valueType = VALUE_UINT;
        found = value(gpu, key, 0);
        break;
    }
    case 161: /* one link: replays, recoveries, CRC errors, speed, state, version */
    case 162:
    case 163:
    case 164:
    case 165:
    case 166:
        return link_field(gpu, into->fieldId, into->scopeId, into);
    case 185: /* power: over a second, now, least, most, as built, now allowed, asked for */
    case 186:
        into->valueType = VALUE_UINT;
        found = 1000 * power_draw(gpu) + 0.5;
        break;
    case 187:
        into->valueType = VALUE_UINT;
        found = 1000 * value(gpu, "power_min_w", value(gpu, "power_w", 0));
        break;
    case 188:
    case 189:
        into->valueType = VALUE_UINT;
        found = 1000 * value(gpu, "power_max_w", value(gpu, "power_w", 0));
        break;
    case 190:
    case 192:
        into->valueType = VALUE_UINT;
        found = 1000 * value(gpu, "power_w", 0);
        break;
    case 193: /* margins: at which it shuts down, slows down, slows down for its memory, is at its highest */
    case 194:
    case 195:
    case 196: {
        static const char *const KEYS[] = {"temperature_shutdown_c", "temperature_slowdown_c", "temperature_memory_max_c"};
        double limit, threshold;
        if (!margins(gpu, &limit) || (into->fieldId < 196 && !pinned(gpu, KEYS[into->fieldId - 193], &threshold)))
            return NVML_ERROR_NOT_SUPPORTED;
        into->valueType = VALUE_INT;
        /* The memory has a limit of its own, and no margin beyond it. */
        into->value.i = into->fieldId < 195 ? limit - threshold : 0;
        return NVML_SUCCESS;
    }
    case 226: /* reset, and drain and reset, wanted: what the next replaces */
    case 227:
        into->valueType = VALUE_UINT;
        found = value(gpu, "recovery_action", 0) == (into->fieldId == 226 ? 1 : 4);
        break;
    case 230:
        into->valueType = VALUE_UINT;
        found = value(gpu, "recovery_action", 0);
        break;
    default:
        return NVML_ERROR_NOT_SUPPORTED;
    }
    if (into->valueType == VALUE_UINT)
        into->value.u = found;
    else
        into->value.ull = found;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int number, nvmlFieldValue_t *values)
{
    struct timespec now;
    ASKED_OF(device, number > 0 && values);
    clock_gettime(CLOCK_REALTIME, &now);
    for (nvmlFieldValue_t *one = values; one < values + number; one++) {
        one->timestamp = now.tv_sec * 1000000ll + now.tv_nsec / 1000;
        one->latencyUsec = 0;
        one->nvmlReturn = field(call.gpu, one);
    }
    return NVML_SUCCESS;
}

/* --- events: nothing ever happens to a simulated GPU that its kernel lines do not say ----------------------------- */

static struct { int unused; } event_set;

EXPORT nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    ASKED(set);
    *set = (nvmlEventSet_t)&event_set;
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    ASKED(set);
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, u64 *types)
{
    ASKED_OF(device, types);
    *types = 0x8; /* Xid */
    return NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, u64 types, nvmlEventSet_t set)
{
    ASKED_OF(device, set);
    return types & ~0x8ull ? NVML_ERROR_NOT_SUPPORTED : NVML_SUCCESS;
}

EXPORT nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, void *data, unsigned int milliseconds)
{
    {
        ASKED(set && data);
    }
    usleep(milliseconds * 1000ull);
    return NVML_ERROR_TIMEOUT;
}

EXPORT nvmlReturn_t nvmlEventSetWait(nvmlEventSet_t set, void *data, unsigned int milliseconds)
{
    return nvmlEventSetWait_v2(set, data, milliseconds);
}

/* --- what no GPU of the lab can do: nvidia-smi writes N/A for it ------------------------------------------------- */

#define REFUSED(function) \
    EXPORT nvmlReturn_t function(void) \
    { \
        ASKED(true); \
        return NVML_ERROR_NOT_SUPPORTED; \
    }
REFUSED(nvmlDeviceGetAccountingPids)
REFUSED(nvmlDeviceGetAttributes_v2)
REFUSED(nvmlDeviceGetAutoBoostedClocksEnabled)
REFUSED(nvmlDeviceGetBridgeChipInfo)
REFUSED(nvmlDeviceGetComputeInstanceId)
REFUSED(nvmlDeviceGetConfComputeMemSizeInfo)
REFUSED(nvmlDeviceGetCpuAffinity)
REFUSED(nvmlDeviceGetDriverModel)
REFUSED(nvmlDeviceGetDynamicPstatesInfo)
REFUSED(nvmlDeviceGetEncoderSessions)
REFUSED(nvmlDeviceGetFBCSessions)
REFUSED(nvmlDeviceGetFanSpeed)
REFUSED(nvmlDeviceGetFanSpeed_v2)
REFUSED(nvmlDeviceGetGpcClkVfOffset)
REFUSED(nvmlDeviceGetGpuInstanceId)
REFUSED(nvmlDeviceGetGpuInstances)
REFUSED(nvmlDeviceGetGpuOperationMode)
REFUSED(nvmlDeviceGetGridLicensableFeatures_v4)
REFUSED(nvmlDeviceGetHostVgpuMode)
REFUSED(nvmlDeviceGetInforomConfigurationChecksum)
REFUSED(nvmlDeviceGetInforomImageVersion)
REFUSED(nvmlDeviceGetInforomVersion)
REFUSED(nvmlDeviceGetLastBBXFlushTime)
REFUSED(nvmlDeviceGetMemoryAffinity)
REFUSED(nvmlDeviceGetMigDeviceHandleByIndex)
REFUSED(nvmlDeviceGetP2PStatus)
REFUSED(nvmlDeviceGetProcessUtilization)
REFUSED(nvmlDeviceGetSamples)
REFUSED(nvmlDeviceGetSupportedGraphicsClocks)
REFUSED(nvmlDeviceGetSupportedVgpus)
REFUSED(nvmlDeviceSetComputeMode)
REFUSED(nvmlDeviceSetEccMode)
REFUSED(nvmlDeviceSetMigMode)
REFUSED(nvmlDeviceSetPersistenceMode)
REFUSED(nvmlDeviceSetPowerManagementLimit)
REFUSED(nvmlDeviceSetPowerManagementLimit_v2)
REFUSED(nvmlGpmQueryDeviceSupport)
REFUSED(nvmlGpmQueryIfStreamingEnabled)
REFUSED(nvmlSystemGetConfComputeState)
REFUSED(nvmlSystemGetHicVersion)

/* --- what nvidia-smi asks behind the public door ------------------------------------------------------------------ */

/* nvidia-smi takes a table of functions by its id. Which places of it 535 asks, and with what, was found by giving each
 * place a function of its own. A place that has none answers "not supported". */
typedef struct {
    nvmlProcessInfo_t info;
    u64 protectedMemory;
    char name[4096];
} Entry;

static nvmlReturn_t by_index(unsigned int index, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

static nvmlReturn_t compute_processes(nvmlDevice_t device, unsigned int *number, Entry *entries)
{
    nvmlProcessInfo_t held[64];
    unsigned int room = *number;
    *number = sizeof held / sizeof *held;
    nvmlReturn_t code = nvmlDeviceGetComputeRunningProcesses_v3(device, number, held);
    if (code || *number > room)
        return code ? code : NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int n = 0; n < *number; n++) {
        entries[n] = (Entry){.info = held[n]};
        nvmlSystemGetProcessName(held[n].pid, entries[n].name, sizeof entries[n].name);
    }
    return NVML_SUCCESS;
}

static nvmlReturn_t margin(nvmlDevice_t device, int *celsius)
{
    nvmlMarginTemperature_t asked = {.version = VERSION(nvmlMarginTemperature_t, 1)};
    nvmlReturn_t code = nvmlDeviceGetMarginTemperature(device, &asked);
    *celsius = asked.marginTemperature;
    return code;
}

static nvmlReturn_t unknown(void)
{
    return NVML_ERROR_NOT_SUPPORTED;
}

EXPORT nvmlReturn_t nvmlInternalGetExportTable(const void **table, const void *id)
{
    static const unsigned char KNOWN[16] = {0xc4, 0xfe, 0x3e, 0x6c, 0xc9, 0x8f, 0x6c, 0x4e,
                                            0xa3, 0x27, 0xee, 0x69, 0x6e, 0x12, 0xf7, 0xc4};
    enum { BY_INDEX = 81, COMPUTE = 213, GRAPHICS, MPS, HOST_PCIE = 230, MARGIN = 240, PLACES = 512 };
    static const void *places[PLACES];
    if (!table || !id || memcmp(id, KNOWN, sizeof KNOWN) != 0)
        return NVML_ERROR_NOT_FOUND;
    places[0] = (void *)sizeof places;
    for (int place = 1; place < PLACES; place++)
        places[place] = (void *)unknown;
    places[BY_INDEX] = (void *)by_index;
    places[COMPUTE] = (void *)compute_processes;
    places[GRAPHICS] = (void *)nvmlDeviceGetGraphicsRunningProcesses;
    places[MPS] = (void *)nvmlDeviceGetMPSComputeRunningProcesses;
    places[MARGIN] = (void *)margin;
    places[HOST_PCIE] = (void *)nvmlDeviceGetMaxPcieLinkGeneration;
    *table = places;
    return NVML_SUCCESS;
}
