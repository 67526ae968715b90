# _C.so: a plain shared object that registers operators through the LibTorch stable ABI. It knows
# no Python and, with a static CUDA runtime and torch's CUDA symbols weak, one file serves every
# torch from 2.10 on, CPU builds included.

execute_process(
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/tools/cuda_toolkit.py
  OUTPUT_VARIABLE toolkit ERROR_VARIABLE missing OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${missing}")
endif()
list(GET toolkit 0 CMAKE_CUDA_COMPILER)
list(GET toolkit 1 cuda_library_dir)
list(GET toolkit 2 cuda_version)
if(cuda_library_dir)
  set(CMAKE_CUDA_FLAGS_INIT "-L\"${cuda_library_dir}\"")
endif()

# "8.0 9.0a+PTX" and "80;90a" both become "80 90a"; the newest one also ships as PTX.
set(archs "$ENV{CUDA_ARCHS}")
if(NOT archs)
  set(archs "$ENV{TORCH_CUDA_ARCH_LIST}")
endif()
if(NOT archs)
  set(archs "80;90;100;120")
endif()
string(REGEX REPLACE "[ ,;]+" ";" archs "${archs}")
string(REGEX REPLACE "\\.|\\+PTX" "" archs "${archs}")
list(FILTER archs EXCLUDE REGEX "^$")
list(REMOVE_DUPLICATES archs)
list(SORT archs COMPARE NATURAL)
foreach(arch IN LISTS archs)
  if(NOT arch MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "CUDA_ARCHS: expected compute capabilities such as 80;90, got '${arch}'")
  endif()
endforeach()
list(TRANSFORM archs APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
list(GET archs -1 newest)
list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)

# find_package(Torch) would ask a CUDA build of torch for a whole matching toolkit; the headers
# and three libraries are all it takes.
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${Python3_EXECUTABLE} has no torch; its headers are needed")
endif()

file(GLOB native_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/ops/*.cu
     ${CMAKE_CURRENT_SOURCE_DIR}/csrc/ops/*.cpp)
string(REPLACE ";" " " arch_names "${archs}")
set(build_info "CUDA ${cuda_version}, sm ${arch_names}, PTX ${newest}")
configure_file(cmake/build_info.cpp.in build_info.cpp @ONLY)

message(STATUS "fusednorm: _C.so for ${build_info}, compiled by ${CMAKE_CUDA_COMPILER}")
add_library(_C MODULE ${native_sources} ${CMAKE_CURRENT_BINARY_DIR}/build_info.cpp)
set_target_properties(_C PROPERTIES PREFIX "" CUDA_RUNTIME_LIBRARY Static)
target_include_directories(_C PRIVATE csrc)
target_include_directories(
  _C SYSTEM PRIVATE ${torch_dir}/include ${torch_dir}/include/torch/csrc/api/include)
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=0x020a000000000000 USE_CUDA)
# __FILE__ in torch's checks would carry the builder's paths.
set(flags -Wall -ffile-prefix-map=${torch_dir}/include/= -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
target_compile_options(_C PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${flags}>")
foreach(flag IN LISTS flags)
  target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${flag}>)
endforeach()
if(DEFINED ENV{NVCC_THREADS})
  target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=$ENV{NVCC_THREADS}>)
endif()
# The weak stream symbol is looked up through libtorch, so it must be a dependency although
# nothing in it is referenced.
target_link_directories(_C PRIVATE ${torch_dir}/lib)
target_link_options(_C PRIVATE -s LINKER:--no-as-needed)
target_link_libraries(_C PRIVATE torch torch_cpu c10)
install(TARGETS _C LIBRARY DESTINATION .)
